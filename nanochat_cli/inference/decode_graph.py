"""The CUDA graph of one decoding step: the ordinary forward pass of one token, captured through a static cache.

Launching costs more than computing at one token, and a replayed graph launches once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanochat_cli.model.cache import KVCache, StaticCache

WARM_UP_STEPS = 2
"""Runs before the capture, so that kernels are compiled and their workspaces allocated."""


class DecodeGraph:
    """`read` captured for one cache: it reads tokens int64 [B, 1] into a cache and returns logits [B, V]; CUDA only."""

    def __init__(self, read: Callable[[Tensor, KVCache], Tensor], tokens: Tensor, cache: KVCache) -> None:
        self._cache, self._tokens = cache, tokens.clone()
        self._position = torch.full((1,), cache.length, dtype=torch.int64, device=tokens.device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):  # writes the position that the first replay writes again
                read(self._tokens, StaticCache(cache, self._position))
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._logits = read(self._tokens, StaticCache(cache, self._position))

    def fits(self, tokens: Tensor, cache: KVCache) -> bool:
        """Whether this graph was captured for these buffers."""
        return cache is self._cache and tokens.shape == self._tokens.shape

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits [B, V] of the next position; valid until the next call. ValueError past the end of the cache."""
        if cache.length >= cache.max_seq_len:
            raise ValueError(f"position {cache.length + 1} is past the {cache.max_seq_len} that the cache holds")
        self._tokens.copy_(tokens)
        self._position.fill_(cache.length)
        self._graph.replay()
        cache.advance(1)
        return self._logits
