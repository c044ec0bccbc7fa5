"""Batches of conversations: packed rows in which only answers are targets, and windows of text among them.

A row holds whole conversations, each ended by the stop token; the rest of it is stop tokens. A conversation longer than
a row keeps its head. All of it is a function of (seed, index), as in `data.batches`. Knows shards and token ids.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.batches import IGNORE_INDEX, Batch, Tokens
from nanochat_cli.data.mixture import Mixture, Share
from nanochat_cli.data.packing import Packing
from nanochat_cli.data.shards import Shard
from nanochat_cli.errors import DataError


class Conversations:
    """Those of one split, by number; cut after `capacity` tokens, and without those that have no answer before that."""

    def __init__(self, shards: Sequence[Shard], capacity: int) -> None:
        self._shards = shards
        counts = [len(shard.doc_offsets) - 1 for shard in shards]
        self._firsts = np.concatenate(([0], np.cumsum(counts))).tolist()
        lengths = np.concatenate([np.diff(shard.doc_offsets) for shard in shards] or [np.zeros(0, dtype=np.int64)])
        long = np.flatnonzero(lengths > capacity)
        self._capacity = capacity
        unanswered = [number for number in long.tolist() if not self._read(number)[1].any()]
        self.left_out, self.cut = len(unanswered), len(long) - len(unanswered)
        """How many are missing, and how many are only the beginning of one."""
        self._kept = np.delete(np.arange(len(lengths)), unanswered)
        self.lengths = np.minimum(lengths, capacity)[self._kept].astype(np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Token ids, and which of them are trained."""
        return self._read(int(self._kept[number]))

    def _read(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        at = bisect_right(self._firsts, number) - 1
        shard = self._shards[at]
        start, stop = shard.doc_offsets[number - self._firsts[at] : number - self._firsts[at] + 2].tolist()
        here = slice(start, min(stop, start + self._capacity))
        assert shard.loss_mask is not None, "shards of conversations have a loss mask"
        return shard.tokens[here].astype(np.int64), shard.loss_mask[here].astype(bool)


class PackedRows:
    """Rows of seq_len inputs and targets, int64; a target of -100 does not count. stop: the token between documents."""

    def __init__(self, shards: Sequence[Shard], stop: int, seq_len: int, seed: int) -> None:
        self.conversations = Conversations(shards, seq_len + 1)
        if not len(self.conversations):
            raise DataError(
                f"no conversation has an answer within train.seq_len = {seq_len} tokens; raise it, or give shorter ones"
            )
        self.packing = Packing(self.conversations.lengths, seq_len + 1, seed)
        self.stop, self.seq_len = stop, seq_len

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, numbers: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Inputs and targets, int64 [seq_len], of these conversations side by side."""
        tokens = np.full(self.seq_len + 1, self.stop, dtype=np.int64)
        targets = np.full(self.seq_len + 1, IGNORE_INDEX, dtype=np.int64)
        start = 0
        for number in numbers:
            ids, trained = self.conversations[number]
            tokens[start : start + len(ids)] = ids
            targets[start : start + len(ids)][trained] = ids[trained]
            start += len(ids)
        return tokens[:-1], targets[1:]

    def evaluation_rows(self, max_tokens: int | None = None) -> list[int]:
        """All rows, or as many as have `max_tokens` positions, but at least one, spread evenly over the order."""
        count = len(self) if max_tokens is None else max(1, min(len(self), max_tokens // self.seq_len))
        return [(2 * i + 1) * len(self) // (2 * count) for i in range(count)]

    def evaluation(self, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
        """Those rows in batches of one shape, int64 [batch_size, seq_len]; the last one is filled with nothing."""
        chosen = self.evaluation_rows(max_tokens)
        for first in range(0, len(chosen), batch_size):
            rows = [self.row(self.packing.in_order(number)) for number in chosen[first : first + batch_size]]
            rows += [self.row([])] * (batch_size - len(rows))
            yield np.stack([inputs for inputs, _ in rows]), np.stack([targets for _, targets in rows])


class ChatBatches:
    """Training batches. text: the stream that a share `mix` of the rows are windows of, every target of which counts.

    shift, stride: see `data.batches`.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch_size: int,
        seed: int,
        shift: int = 0,
        stride: int | None = None,
        text: Tokens | None = None,
        mix: float = 0.0,
    ) -> None:
        self.rows, self.batch_size, self.seq_len, self.shift = rows, batch_size, rows.seq_len, shift
        self.stride = batch_size if stride is None else stride
        self.text = text
        self._mixture = None
        if text is not None and mix:
            as_stream = Share("conversations", len(rows) * rows.seq_len + 1, 1 - mix)
            self._mixture = Mixture([as_stream, Share("data.base", len(text), mix)], rows.seq_len, seed)

    def batch(self, index: int) -> Batch:
        """Batch `index` ≥ 0: (inputs, targets), int64 [batch_size, seq_len]."""
        first = index * self.stride + self.shift
        rows = [self._row(place) for place in range(first, first + self.batch_size)]
        return np.stack([inputs for inputs, _ in rows]), np.stack([targets for _, targets in rows])

    def _row(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if self._mixture is None:
            return self.rows.row(self.rows.packing.row(place))
        source, own = self._mixture.source_at(place)
        if source == 0:
            return self.rows.row(self.rows.packing.row(own))
        assert self.text is not None
        start = self._mixture.start(place) - len(self.rows) * self.seq_len - 1
        window = self.text[start : start + self.seq_len + 1]
        return window[:-1], window[1:]
