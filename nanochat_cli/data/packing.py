"""Whole documents in rows of one length: best-fit decreasing, and an order of the rows for every epoch.

Which lengths share a row depends on the lengths alone. An epoch exchanges documents of the same length with each other
and visits the rows in an order of its own, so that what a row holds is a function of (seed, epoch), found without
packing again.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.order import permuted


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of positions in `lengths`, which descend: each goes to the fullest row that has room for it.

    Best-fit decreasing takes at most 11/9 of the fewest rows possible, and one more (Johnson 1973). No length may be
    above `capacity`.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of with_room, ascending
    for position, length in enumerate(lengths):
        place = bisect_left(rooms, length)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        rows[row].append(position)
        if (left := room - length) > 0:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(row)
    return rows


class Packing:
    """Documents of these `lengths`, int64 [n], at most `capacity` each, in rows of `capacity` tokens."""

    def __init__(self, lengths: NDArray[np.int64], capacity: int, seed: int) -> None:
        self.seed = seed
        self._order = np.argsort(-lengths, kind="stable")
        descending = lengths[self._order]
        self._rows = best_fit(descending.tolist(), capacity)
        _, firsts, counts = np.unique(-descending, return_index=True, return_counts=True)
        self._first_alike = np.repeat(firsts, counts)
        """For each position in the order: the first one of the same length, and how many there are."""
        self._alike = np.repeat(counts, counts)
        self.filled = float(lengths.sum() / max(1, len(self._rows) * capacity))
        """Share of the positions of all rows that hold documents."""

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, place: int) -> list[int]:
        """The documents of the row at a place of the endless order, in which every epoch has each document once."""
        epoch, within = divmod(place, len(self))
        return [
            self._document(position, epoch) for position in self._rows[permuted(within, len(self), self.seed, epoch)]
        ]

    def in_order(self, number: int) -> list[int]:
        """The documents of a row where nothing is exchanged: for evaluation."""
        return self._order[self._rows[number]].tolist()

    def _document(self, position: int, epoch: int) -> int:
        first, count = int(self._first_alike[position]), int(self._alike[position])
        return int(self._order[first + permuted(position - first, count, self.seed + count, epoch)])
