"""Packing: every document once per epoch, in as few rows as the textbook's best fit, a function of (seed, epoch)."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.data.packing import Packing, best_fit

CAPACITY = 50


def textbook(lengths: list[int], capacity: int) -> list[int]:
    """Room left in the rows of best-fit decreasing, by trying every row."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=80)


@given(lengths=LENGTHS)
def test_rows_are_those_of_the_textbook(lengths: list[int]) -> None:
    descending = sorted(lengths, reverse=True)
    rows = best_fit(descending, CAPACITY)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    rooms = [CAPACITY - sum(descending[position] for position in row) for row in rows]
    assert sorted(rooms) == textbook(lengths, CAPACITY)


@given(lengths=LENGTHS, seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_every_epoch_has_each_document_once_in_rows_that_hold_them(lengths: list[int], seed: int, epoch: int) -> None:
    packing = Packing(np.array(lengths), CAPACITY, seed)
    rows = [packing.row(epoch * len(packing) + place) for place in range(len(packing))]
    assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
    assert all(sum(lengths[document] for document in row) <= CAPACITY for row in rows)
    assert packing.filled == pytest.approx(sum(lengths) / (CAPACITY * len(rows)))
    again = Packing(np.array(lengths), CAPACITY, seed)
    assert [again.row(epoch * len(packing) + place) for place in reversed(range(len(packing)))] == rows[::-1]
    in_order = [packing.in_order(number) for number in range(len(packing))]
    assert sorted(document for row in in_order for document in row) == list(range(len(lengths)))


@pytest.mark.parametrize(("capacity", "count"), [(257, 300), (2049, 3000)])
def test_nearly_every_position_is_filled(capacity: int, count: int) -> None:
    """Of conversations with lengths as instructions have them: many short ones, a long tail."""
    rng = np.random.default_rng(7)
    lengths = np.minimum(rng.lognormal(4, 0.8, count).astype(np.int64) + 8, capacity)
    assert Packing(lengths, capacity, 1).filled >= 0.97


def test_epochs_and_seeds_differ_in_the_order_and_in_what_shares_a_row() -> None:
    rng = random.Random(1)
    lengths = np.array([rng.choice((10, 15, 20)) for _ in range(400)])
    orders = {}
    for seed, epoch in ((1, 0), (1, 1), (2, 0)):
        packing = Packing(lengths, CAPACITY, seed)
        orders[seed, epoch] = [packing.row(epoch * len(packing) + place) for place in range(len(packing))]
    rows = {key: {frozenset(row) for row in order} for key, order in orders.items()}
    keys = list(rows)
    for number, key in enumerate(keys):
        for other in keys[number + 1 :]:
            assert len(rows[key] & rows[other]) < len(rows[key]) / 4
