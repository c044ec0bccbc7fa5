"""Batches: which tokens training and evaluation see, and in what order.

The order is a pure function of (seed, index): no state, no file position, nothing to save in a checkpoint, and the same
for any number of ranks. Knows token streams; knows nothing of models, devices or processes.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.errors import ConfigError, DataError

IGNORE_INDEX = -100
FEISTEL_ROUNDS = 8

Batch = tuple[NDArray[np.int64], NDArray[np.int64]]
"""(inputs, targets), both int64 [rows, T]; targets are the inputs shifted by one token."""


class BatchSource(Protocol):
    """Batches as a pure function of their index: inputs and targets, int64 [batch_size, seq_len]."""

    def batch(self, index: int) -> Batch: ...


class Tokens(Protocol):
    """A sequence of token ids: a `TokenStream`, or anything that reads like one."""

    @property
    def eos_id(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, where: slice, /) -> NDArray[np.int64]: ...


class Batches:
    """Training batches: every epoch visits all windows of `seq_len` + 1 tokens once, in a new order.

    Neighbouring windows share one token, so every token but the first is a target once per epoch. `batch_size` counts
    the rows of all ranks; rank r of `world_size` gets the r-th part of them. shift: an offset in the order, for a run
    that has read a part of it in batches of another size. Raises DataError if the stream is shorter than one window,
    ConfigError if `batch_size` is not a multiple of `world_size`.
    """

    def __init__(
        self,
        stream: Tokens,
        batch_size: int,
        seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shift: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ConfigError(f"train.batch_size = {batch_size} must be a multiple of the {world_size} ranks")
        self.windows = (len(stream) - 1) // seq_len
        if self.windows < 1:
            raise DataError(
                f"the corpus has {len(stream)} training tokens, less than one sequence of train.seq_len = {seq_len} "
                "and the token after it; give more text or lower train.seq_len"
            )
        self.stream = stream
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.rows_per_rank = batch_size // world_size
        self.first_row = rank * self.rows_per_rank + shift

    def batch(self, index: int) -> Batch:
        """This rank's rows of global batch `index` ≥ 0: (inputs, targets), int64 [batch_size / world_size, seq_len]."""
        first = index * self.batch_size + self.first_row
        rows = np.empty((self.rows_per_rank, self.seq_len + 1), dtype=np.int64)
        for row, window in enumerate(self.window_order(first, self.rows_per_rank)):
            start = window * self.seq_len
            rows[row] = self.stream[start : start + self.seq_len + 1]
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def window_order(self, first: int, count: int) -> list[int]:
        """The windows at `count` consecutive places of the endless order, from place `first` on."""
        return [
            permuted(place % self.windows, self.windows, self.seed, place // self.windows)
            for place in range(first, first + count)
        ]

    def epoch(self, index: int) -> float:
        """Epochs completed before batch `index`."""
        return index * self.batch_size / self.windows


def evaluation_batches(stream: Tokens, batch_size: int, seq_len: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Every token of `stream` but the first as a target once, in order: (inputs, targets), int64 [batch_size, seq_len].

    With `max_tokens`, at most that many targets (but at least one window), in windows spread evenly over the stream:
    its beginning may be easier or harder than the rest. The last window and the last batch are padded: target −100,
    input EOS; the shape is always the same, so that a compiled model is not compiled again.
    """
    windows = evaluation_windows(stream, seq_len)
    chosen = evaluation_windows(stream, seq_len, max_tokens)
    for first in range(0, chosen, batch_size):
        inputs = np.full((batch_size, seq_len), stream.eos_id, dtype=np.int64)
        labels = np.full((batch_size, seq_len), IGNORE_INDEX, dtype=np.int64)
        for row in range(min(batch_size, chosen - first)):
            start = (2 * (first + row) + 1) * windows // (2 * chosen) * seq_len
            tokens = stream[start : start + seq_len + 1]
            inputs[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, : len(tokens) - 1] = tokens[1:]
        yield inputs, labels


def evaluation_windows(stream: Tokens, seq_len: int, max_tokens: int | None = None) -> int:
    """The number of windows that `evaluation_batches` reads."""
    targets = len(stream) - 1
    windows = -(-targets // seq_len)
    return windows if max_tokens is None or max_tokens >= targets else max(1, min(windows, max_tokens // seq_len))


def permuted(place: int, size: int, seed: int, epoch: int) -> int:
    """Image of `place` under a pseudo-random permutation of range(size), chosen by (seed, epoch), in O(1) memory.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside (Black and
    Rogaway 2002). Defined here and not by a library, so that a resumed run has the same order under every version.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    key = mix(mix(seed) ^ epoch)
    while True:
        left, right = place >> half, place & mask
        for round_number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (mix(key + (right << 8) + round_number) & mask)
        place = left << half | right
        if place < size:
            return place


def mix(value: int) -> int:
    """splitmix64's finaliser: 64 bits to 64 bits, every input bit moves every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
