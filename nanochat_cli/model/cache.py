"""What incremental decoding remembers: keys and values of the attention layers, states of the DeltaNet layers.

The model calls `attend` in every attention layer, writes into `recurrent` in every DeltaNet layer, and moves on with
`advance` once per forward pass. Knows nothing of projections, sampling or tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.model.attend import attend, attend_one


@dataclass
class RecurrentState:
    """Of one DeltaNet layer: state float32 [B, H, D, D]; convolution float32 [B, channels, kernel - 1], last inputs."""

    state: Tensor
    convolution: Tensor

    def clone(self) -> "RecurrentState":
        return RecurrentState(self.state.clone(), self.convolution.clone())


@dataclass(frozen=True)
class Snapshot:
    """What `KVCache.restore` needs to forget the positions read since."""

    length: int
    recurrent: dict[int, RecurrentState]


class KVCache:
    """Keys and values of the positions seen so far, each [attention layers, B, Hkv, max_seq_len, D], contiguous.

    recurrent: by layer, of the DeltaNet layers; its size does not depend on the positions.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_seq_len: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.memory: KVCache | None = None
        """Of a row: the cache of the whole batch that it is a part of, at `place`."""
        self.place = 0
        self.max_seq_len = min(max_seq_len or config.max_seq_len, config.max_seq_len)
        self.length = 0
        """Positions held; every row of the batch has the same number."""
        self.slots = [sum(not delta for delta in config.delta_layers[:layer]) for layer in range(config.n_layers)]
        """By layer: which of the keys and values are its own."""
        n_attention = config.n_layers - sum(config.delta_layers)
        shape = (n_attention, batch_size, config.n_kv_heads, self.max_seq_len, config.resolved_head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        heads, width, kernel = config.delta_heads, config.delta_head_dim, config.deltanet.conv_kernel
        self.recurrent = {
            layer: RecurrentState(
                torch.zeros(batch_size, heads, width, width, device=device),
                torch.zeros(batch_size, 3 * heads * width, kernel - 1, device=device),
            )
            for layer, delta in enumerate(config.delta_layers)
            if delta
        }

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys, values [B, Hkv, T, D] of the next T positions of a layer.

        Returns views [B, Hkv, length + T, D] of all positions up to the new ones. Raises ValueError past max_seq_len.
        """
        end = self.length + keys.shape[2]
        if end > self.max_seq_len:
            raise ValueError(f"position {end} is past the {self.max_seq_len} that the key/value cache holds")
        slot = self.slots[layer]
        self.keys[slot, :, :, self.length : end] = keys
        self.values[slot, :, :, self.length : end] = values
        return self.keys[slot, :, :, :end], self.values[slot, :, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` for the next T positions, which are stored: they see every held one and, causally, each other."""
        length = q.shape[2]
        k, v = self.update(layer, k, v)
        if length == k.shape[2]:
            return attend(q, k, v)
        if length == 1:
            return attend_one(q, k, v)
        mask = q.new_ones(length, k.shape[2]).tril(diagonal=k.shape[2] - length).bool()
        return attend(q, k, v, is_causal=False, mask=mask)

    def next_rows(self, table: Tensor, count: int) -> Tensor:
        """The rows of a table [positions, ...] that belong to the next `count` positions."""
        return table[self.length : self.length + count]

    def advance(self, n_positions: int) -> None:
        """Count the positions of a forward pass as held, after its last layer."""
        self.length += n_positions

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    def clear(self) -> None:
        """Forget every position; the memory stays."""
        self.length = 0
        for state in self.recurrent.values():
            state.state.zero_()
            state.convolution.zero_()

    def truncate(self, length: int) -> None:
        """Forget the positions from `length` on. ValueError where recurrent states cannot go back: use `restore`."""
        if self.recurrent and length != self.length:
            raise ValueError("a recurrent state cannot be truncated: take a snapshot before and restore it")
        self.length = min(length, self.length)

    def row(self, place: int) -> "KVCache":
        """One row of the batch as a cache of its own, which shares the memory and has its own length."""
        found = copy.copy(self)
        found.memory, found.place, here = self, place, slice(place, place + 1)
        found.keys, found.values = self.keys[:, here], self.values[:, here]
        found.recurrent = {
            layer: RecurrentState(saved.state[here], saved.convolution[here]) for layer, saved in self.recurrent.items()
        }
        return found

    def copy_from(self, source: "KVCache", length: int) -> None:
        """Hold the first `length` positions of another cache of this shape, and its recurrent states."""
        self.keys[..., :length, :], self.values[..., :length, :] = (
            memory[..., :length, :] for memory in (source.keys, source.values)
        )
        self.restore(Snapshot(length, source.recurrent))

    def snapshot(self) -> Snapshot:
        """Where the cache stands; keys and values are not copied, since later ones only overwrite later positions."""
        return Snapshot(self.length, {layer: state.clone() for layer, state in self.recurrent.items()})

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this cache."""
        self.length = snapshot.length
        for layer, saved in snapshot.recurrent.items():
            self.recurrent[layer].state.copy_(saved.state)
            self.recurrent[layer].convolution.copy_(saved.convolution)

    @property
    def bytes(self) -> int:
        """Memory of keys, values and recurrent states."""
        recurrent = sum(4 * (s.state.numel() + s.convolution.numel()) for s in self.recurrent.values())
        return 2 * self.keys.numel() * self.keys.element_size() + recurrent


class CacheRows(KVCache):
    """Several caches of one row each, at lengths of their own, as a pass over the next token of each sees them.

    Every row attends alone over its own positions, so that it computes what it would compute without the others.
    """

    def __init__(self, rows: Sequence[KVCache]) -> None:
        vars(self).update(vars(rows[0]))
        self.rows = rows
        self.length = max(row.length for row in rows)
        self.recurrent = {
            layer: RecurrentState(
                torch.cat([row.recurrent[layer].state for row in rows]),
                torch.cat([row.recurrent[layer].convolution for row in rows]),
            )
            for layer in self.recurrent
        }

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(self.rows, q.split(1), k.split(1), v.split(1), strict=True)
        return torch.cat([row.attend(layer, *part) for row, *part in parts])

    def next_rows(self, table: Tensor, count: int) -> Tensor:
        """[B, count, ...], of every row its own."""
        return torch.stack([row.next_rows(table, count) for row in self.rows])

    def advance(self, n_positions: int) -> None:
        for number, row in enumerate(self.rows):
            for layer, found in self.recurrent.items():
                row.recurrent[layer].state.copy_(found.state[number : number + 1])
                row.recurrent[layer].convolution.copy_(found.convolution[number : number + 1])
            row.advance(n_positions)


class StaticCache(KVCache):
    """A cache at positions int64 [B] that are read from memory: the next token of every row, each at its own.

    Every position takes the same kernels with the same shapes, which is what a CUDA graph replays: the whole memory is
    attended over, under a mask. Shares the memory of `cache`, which does not advance. For models of attention layers.
    """

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        vars(self).update(vars(cache))
        self.positions = positions
        places = torch.arange(self.max_seq_len, device=positions.device)
        self.visible = (places <= positions[:, None])[:, None, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.keys[self.slots[layer]], self.values[self.slots[layer]]
        here = self.positions.reshape(-1, 1, 1, 1).expand_as(k)
        keys.scatter_(2, here, k)
        values.scatter_(2, here, v)
        return attend_one(q, keys, values, self.visible)

    def next_rows(self, table: Tensor, count: int) -> Tensor:
        return table.index_select(0, self.positions)[:, None]
