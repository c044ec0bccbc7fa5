"""The key/value cache of incremental decoding: one preallocated pair of tensors for all layers.

The model writes with `update` in every attention layer and moves on with `advance` once per forward
pass. Knows shapes only: nothing of attention, sampling or tokens.
"""

import torch
from torch import Tensor

from nanochat_cli.config.schema import ModelConfig


class KVCache:
    """Keys and values of the positions seen so far, each [layers, B, Hkv, max_seq_len, D], contiguous."""

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_seq_len = min(max_seq_len or config.max_seq_len, config.max_seq_len)
        self.length = 0
        """Positions held; every row of the batch has the same number."""
        shape = (config.n_layers, batch_size, config.n_kv_heads, self.max_seq_len, config.resolved_head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys, values [B, Hkv, T, D] of the next T positions of a layer.

        Returns views [B, Hkv, length + T, D] of all positions up to the new ones. Raises ValueError past max_seq_len.
        """
        end = self.length + keys.shape[2]
        if end > self.max_seq_len:
            raise ValueError(f"position {end} is past the {self.max_seq_len} that the key/value cache holds")
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_positions: int) -> None:
        """Count the positions of a forward pass as held, after its last layer."""
        self.length += n_positions

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    def clear(self) -> None:
        """Forget every position; the memory stays."""
        self.length = 0

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()
