"""The order of addition: one balanced binary tree, whoever adds which part of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.training.distributed.ranks import units_of
from nanochat_cli.training.distributed.tree import Node, TreeSum, nodes_of

WRITTEN_OUT = {
    1: "0",
    2: "(0+1)",
    3: "((0+1)+2)",
    4: "((0+1)+(2+3))",
    5: "(((0+1)+(2+3))+4)",
    6: "(((0+1)+(2+3))+(4+5))",
    7: "(((0+1)+(2+3))+((4+5)+6))",
    8: "(((0+1)+(2+3))+((4+5)+(6+7)))",
}


def write(left: str, right: str) -> str:
    return f"({left}+{right})"


@pytest.mark.parametrize("units", WRITTEN_OUT)
def test_units_are_added_in_the_order_that_is_written_here(units):
    tree = TreeSum(units, write)
    for unit in range(units):
        tree.put(Node(0, unit), str(unit))
    assert tree.total == WRITTEN_OUT[units]


@given(units=st.integers(1, 200), data=st.data())
def test_ranks_that_add_their_own_units_first_give_the_same_order(units, data):
    ranks = data.draw(st.integers(1, units))
    alone, together = TreeSum(units, write), TreeSum(units, write)
    for unit in range(units):
        alone.put(Node(0, unit), str(unit))
    for rank in range(ranks):
        own = TreeSum(units, write)
        for unit in units_of(rank, ranks, units):
            own.put(Node(0, unit), str(unit))
        assert [node for node, _ in own.nodes] == nodes_of(units_of(rank, ranks, units), units)
        assert len(own.nodes) <= 2 * units.bit_length()
        for node, value in own.nodes:
            together.put(node, value)
    assert together.total == alone.total


@given(units=st.integers(1, 64), ranks=st.integers(1, 64))
def test_a_power_of_two_that_divides_the_units_sends_one_node_per_rank(units, ranks):
    if units % ranks == 0 and ranks & (ranks - 1) == 0 and (units // ranks).bit_count() == 1:
        assert all(len(nodes_of(units_of(rank, ranks, units), units)) == 1 for rank in range(ranks))


@given(units=st.integers(1, 100), data=st.data())
def test_every_rank_has_units_and_every_unit_a_rank(units, data):
    ranks = data.draw(st.integers(1, units))
    runs = [units_of(rank, ranks, units) for rank in range(ranks)]
    assert all(runs)
    assert [unit for run in runs for unit in run] == list(range(units))
