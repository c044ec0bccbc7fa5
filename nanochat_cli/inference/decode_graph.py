"""The CUDA graph of one decoding step: the ordinary forward pass of one token, captured through a static cache.

Launching costs more than computing at one token, and a replayed graph launches once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat_cli.model.cache import KVCache, StaticCache

WARM_UP_STEPS = 2
"""Runs before the capture, so that kernels are compiled and their workspaces allocated."""


class DecodeGraph:
    """`read` captured for all rows of a cache: it reads tokens int64 [B, 1] and returns logits [B, V]; CUDA only."""

    def __init__(self, read: Callable[[Tensor, KVCache], Tensor], cache: KVCache) -> None:
        batch, device = cache.keys.shape[1], cache.keys.device
        self._cache, self._tokens = cache, torch.zeros(batch, 1, dtype=torch.int64, device=device)
        # The last position: nothing that is read later is there. Rows that are not read are written there, too.
        self._positions = torch.full((batch,), cache.max_seq_len - 1, dtype=torch.int64, device=device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                read(self._tokens, StaticCache(cache, self._positions))
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._logits = read(self._tokens, StaticCache(cache, self._positions))

    def fits(self, cache: KVCache) -> bool:
        """Whether this graph was captured for this memory."""
        return cache is self._cache

    def next_logits(self, tokens: Tensor, rows: Sequence[KVCache]) -> Tensor:
        """Logits [B, V] after a token of each row: of the whole cache, valid until the next call, or of rows of it.

        Does not advance them. ValueError past the end of the cache.
        """
        limit = self._cache.max_seq_len
        if (position := max(row.length for row in rows)) >= limit:
            raise ValueError(f"position {position + 1} is past the {limit} that the cache holds")
        if rows[0] is self._cache or len(self._tokens) == 1:
            self._tokens.copy_(tokens)
            self._positions.fill_(position)
            self._graph.replay()
            return self._logits
        places, lengths = torch.tensor([(row.place, row.length) for row in rows], device=tokens.device).unbind(1)
        self._tokens[places] = tokens
        self._positions.fill_(limit - 1)[places] = lengths
        self._graph.replay()
        return self._logits[places]
