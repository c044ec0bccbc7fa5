"""One decoding step with static shapes, and its CUDA graph.

`decode_step` reads the position from a tensor and attends over the whole preallocated cache under a mask, so that the
same kernels with the same arguments serve every position: what a CUDA graph needs. It runs on any device; only the
capture needs CUDA. Launching costs more than computing at one token, and a replayed graph launches once.
"""

import torch
from torch import Tensor

from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.model.attend import attend_one
from nanochat_cli.model.cache import KVCache

WARM_UP_STEPS = 2
"""Runs before the capture, so that kernels are compiled and their workspaces allocated."""


def decode_step(model: PackedTransformer, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
    """Logits [B, V] after tokens int64 [B, 1] at `position` (int64 [1], on the device); writes their keys and values.

    For blocks that are `is_static`. Does not advance the cache.
    """
    cos, sin = model.cos.index_select(0, position), model.sin.index_select(0, position)
    visible = (torch.arange(cache.max_seq_len, device=tokens.device) <= position).reshape(1, 1, 1, -1)
    x = model.embed(tokens)
    for layer, block in enumerate(model.blocks):
        assert block.attention is not None, "only for models of attention layers"
        q, k, v, gate = block.attention.heads(x, block.attention_norm, cos, sin)
        cache.keys[layer].index_copy_(2, position, k)
        cache.values[layer].index_copy_(2, position, v)
        x = x + block.attention.output(attend_one(q, cache.keys[layer], cache.values[layer], visible), gate)
        x = x + block.feed_forward(x, block.ffn_norm)
    return model.logits(model.norm(x)[:, -1])


class DecodeGraph:
    """`decode_step` captured for one cache; CUDA only."""

    def __init__(self, model: PackedTransformer, tokens: Tensor, cache: KVCache) -> None:
        self._cache = cache
        self._tokens = tokens.clone()
        self._position = torch.full((1,), cache.length, dtype=torch.int64, device=tokens.device)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream(tokens.device)
        stream.wait_stream(torch.cuda.current_stream(tokens.device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):  # writes the position that the first replay writes again
                decode_step(model, self._tokens, self._position, cache)
        torch.cuda.current_stream(tokens.device).wait_stream(stream)
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._logits = decode_step(model, self._tokens, self._position, cache)

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
