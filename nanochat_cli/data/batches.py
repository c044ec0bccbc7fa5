"""Batches: which tokens training and evaluation see, and in what order.

The order is a pure function of (seed, index): no state, no file position, nothing to save in a checkpoint, and the same
for any number of ranks. Knows token streams; knows nothing of models, devices or processes.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.mixture import Mixture, Share
from nanochat_cli.data.order import permuted
from nanochat_cli.errors import DataError

IGNORE_INDEX = -100

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

    Neighbouring windows share one token, so every token but the first is a target once per epoch. shift: an offset in
    the order, for a run that has read a part of it in batches of another size, and for a process that reads a part of
    each batch. shares: the sources of the stream, which windows are drawn from by weight, each in an order of its own.
    stride: rows from one batch to the next, if others read the rest. Raises DataError if the stream is shorter than
    one window.
    """

    def __init__(
        self,
        stream: Tokens,
        batch_size: int,
        seq_len: int,
        seed: int,
        shift: int = 0,
        shares: Sequence[Share] = (),
        stride: int | None = None,
    ) -> None:
        self.windows = (len(stream) - 1) // seq_len
        if self.windows < 1:
            raise DataError(
                f"the corpus has {len(stream)} training tokens, less than one sequence of train.seq_len = {seq_len} "
                "and the token after it; give more text or lower train.seq_len"
            )
        self.mixture = Mixture(shares, seq_len, seed) if shares else None
        self.stream = stream
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.shift = shift
        self.stride = batch_size if stride is None else stride

    def batch(self, index: int) -> Batch:
        """Batch `index` ≥ 0: (inputs, targets), int64 [batch_size, seq_len]."""
        rows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        for row, start in enumerate(self.starts_of(index)):
            rows[row] = self.stream[start : start + self.seq_len + 1]
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def starts_of(self, index: int) -> list[int]:
        """The tokens at which the windows of a batch begin."""
        return self.starts(index * self.stride + self.shift, self.batch_size)

    def starts(self, first: int, count: int) -> list[int]:
        """The tokens at which the windows at `count` consecutive places of the endless order begin."""
        if self.mixture is not None:
            return [self.mixture.start(place) for place in range(first, first + count)]
        return [window * self.seq_len for window in self.window_order(first, count)]

    def window_order(self, first: int, count: int) -> list[int]:
        """The windows at `count` consecutive places of the endless order of one source, from place `first` on."""
        return [
            permuted(place % self.windows, self.windows, self.seed, place // self.windows)
            for place in range(first, first + count)
        ]

    def epoch(self, index: int) -> float:
        """Epochs completed before batch `index`."""
        return index * self.stride / self.windows


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
