"""pass@k: the chance that at least one of k completions of a problem passes its tests.

Knows how many completions were drawn and how many passed; knows nothing of programs or models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.share_intervals import share_interval


@dataclass(frozen=True)
class PassAtK:
    """value: the mean over problems, in 0..1; interval: its 95 % interval, None for a single problem."""

    k: int
    value: float
    interval: tuple[float, float] | None
    problems: int


def pass_at_k(n: int, c: int, k: int) -> float:
    """The unbiased estimate 1 − C(n − c, k) / C(n, k) from n completions of which c pass (arXiv:2107.03374, eq. 1).

    Computed in integers and divided once, so that it is the float nearest to the exact value. Raises ConfigError for
    k < 1 or n < k, and ValueError unless 0 ≤ c ≤ n.
    """
    if k < 1:
        raise ConfigError(f"k is {k}: pass@k needs a k of at least 1")
    if n < k:
        raise ConfigError(f"pass@{k} needs at least {k} completions of each problem, there are {n}: draw more")
    if not 0 <= c <= n:
        raise ValueError(f"{c} of {n} completions cannot have passed")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def mean_pass_at_k(counts: Mapping[str, tuple[int, int]], ks: Sequence[int] = (1,)) -> list[PassAtK]:
    """pass@k over problems for each k; counts: (completions drawn, completions that passed) of each problem, by id.

    The interval is over problems (`share_intervals`): it reflects the choice of problems, not the randomness of the
    completions. Raises ConfigError when there is no problem, for k < 1, and, with its id, for a problem with fewer than
    k completions: such a problem is never counted as failed.
    """
    if not counts:
        raise ConfigError("pass@k needs at least one problem: the problem set is empty")
    means = []
    for k in ks:
        for name, (n, _) in counts.items():
            if n < k:
                raise ConfigError(f"{name}: pass@{k} needs at least {k} completions, there are {n}: draw more")
        values = [pass_at_k(n, c, k) for n, c in counts.values()]
        means.append(PassAtK(k, math.fsum(values) / len(values), share_interval(values), len(values)))
    return means
