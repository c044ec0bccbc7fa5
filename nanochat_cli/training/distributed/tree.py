"""The order in which the gradients of a step are added: one balanced binary tree over its units, whoever adds.

A unit is a micro-batch. Node (level, place) is the sum of units place · 2^level … (place + 1) · 2^level − 1, as far as
they exist: of its two halves, or of the first alone. Whoever adds complete nodes in order gets the same bits.
"""

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Node(NamedTuple):
    level: int
    place: int


class TreeSum(Generic[T]):
    """The sum of nodes that are put in order. add: of two neighbours; may change the first one in place.

    nodes: what is summed so far, as few nodes as possible: about log2 of the units at most.
    """

    def __init__(self, units: int, add: Callable[[T, T], T]) -> None:
        self.units, self._add = units, add
        self.nodes: list[tuple[Node, T]] = []

    def put(self, node: Node, value: T) -> None:
        """The next node on the right."""
        self.nodes.append((node, value))
        while (1 << (top := self.nodes[-1][0]).level) < self.units:
            parent = Node(top.level + 1, top.place // 2)
            if top.place % 2:
                if len(self.nodes) < 2 or self.nodes[-2][0] != Node(top.level, top.place - 1):
                    return  # another rank has its left half
                right = self.nodes.pop()[1]
                self.nodes[-1] = parent, self._add(self.nodes[-1][1], right)
            elif (top.place + 1) << top.level >= self.units:
                self.nodes[-1] = parent, self.nodes[-1][1]  # there is no right half
            else:
                return

    @property
    def total(self) -> T:
        """The sum of all units."""
        ((node, value),) = self.nodes
        assert node.place == 0
        assert 1 << node.level >= self.units
        return value


def nodes_of(run: range, units: int) -> list[Node]:
    """The nodes that remain of a run of neighbouring units."""
    tree: TreeSum[None] = TreeSum(units, lambda left, right: None)
    for unit in run:
        tree.put(Node(0, unit), None)
    return [node for node, _ in tree.nodes]
