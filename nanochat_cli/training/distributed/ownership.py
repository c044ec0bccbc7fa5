"""Which rank owns which parameter: a pure function of names, shapes and the number of ranks.

The owner alone keeps the optimizer's state and takes the steps. Matrices stay whole, so that no number of ranks has
to divide anything.
"""

import math
from collections.abc import Mapping


def owners(shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, int]:
    """Rank by name: the most expensive parameter first, each to the rank with the least work so far."""
    work = [0] * ranks
    owner: dict[str, int] = {}
    for name in sorted(shapes, key=lambda name: (-cost(shapes[name]), name)):
        owner[name] = work.index(min(work))
        work[owner[name]] += cost(shapes[name])
    return owner


def cost(shape: tuple[int, ...]) -> int:
    """Multiplications of a step, up to a factor: orthogonalising [n, m] takes n · m · min(n, m), the rest is linear."""
    return math.prod(shape) * (min(shape) if len(shape) == 2 else 1)
