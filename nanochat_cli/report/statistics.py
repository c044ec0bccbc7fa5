"""What matched runs say about a difference: paired comparisons over seeds, with an interval.

The interval is a bootstrap interval of the mean from ENOUGH_FOR_INTERVAL seeds on. Of fewer, resampling knows nothing
that would deserve a level, and it is the range of the seeds: the smallest and the largest.

Runs of the same seed have the same data in the same order and, where shapes agree, the same initial weights, so that
they are compared pair by pair. Knows numbers only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

LEVEL = 0.95
RESAMPLES = 10_000
ENOUGH_FOR_INTERVAL = 6
RANGE = "range of the seeds"

Form = Literal["ratio", "saving", "difference", "value"]
"""ratio: above 1 is better than the peer; saving: 1 − ours / peer; difference: ours − peer; value: ours alone."""


@dataclass(frozen=True)
class Estimate:
    """interval: of the value, as `seed_interval` has it; None with fewer than two seeds."""

    value: float
    interval: tuple[float, float] | None
    seeds: int


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, §13); None with fewer than two values.

    The same values give the same interval. With a few values it is too narrow: of three it is never wider than from
    the smallest to the largest.
    """
    found = np.asarray(values, dtype=np.float64)
    if len(found) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(found), size=(resamples, len(found)))
    low, high = np.quantile(found[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Smallest and largest of a few values, the bootstrap interval of their mean at LEVEL of many; None of one."""
    if len(values) < 2:
        return None
    return bootstrap_interval(values) if len(values) >= ENOUGH_FOR_INTERVAL else (min(values), max(values))


def interval_name(seeds: int) -> str:
    """What `seed_interval` of so many values may be called."""
    return f"{LEVEL:.0%} interval".replace("%", " %") if seeds >= ENOUGH_FOR_INTERVAL else RANGE


def compare(
    ours: Sequence[float], peers: Sequence[float] | None, form: Form, *, smaller_is_better: bool = False
) -> Estimate:
    """Compare seed by seed; ours[i] and peers[i] have the same seed.

    Ratios and savings are geometric means, so that a ratio and its inverse say the same. Raises ValueError without
    values, for a missing peer, and for a ratio of numbers that are not positive.
    """
    if not ours:
        raise ValueError("there is nothing to compare")
    if form == "value":
        return _estimate(ours)
    if peers is None or len(peers) != len(ours):
        raise ValueError(f"a {form} needs one peer for each value")
    if form == "difference":
        return _estimate([mine - theirs for mine, theirs in zip(ours, peers, strict=True)])
    if min(*ours, *peers) <= 0:
        raise ValueError(f"a {form} needs positive numbers")
    logs = _estimate([float(np.log(mine / theirs)) for mine, theirs in zip(ours, peers, strict=True)])
    if form == "saving":
        return _mapped(logs, lambda x: -float(np.expm1(x)))
    return _mapped(logs, (lambda x: float(np.exp(-x))) if smaller_is_better else (lambda x: float(np.exp(x))))


def _estimate(values: Sequence[float]) -> Estimate:
    return Estimate(float(np.mean(values)), seed_interval(values), len(values))


def _mapped(estimate: Estimate, function: Callable[[float], float]) -> Estimate:
    """The estimate on another scale; function: monotone."""
    interval = None
    if estimate.interval is not None:
        low, high = sorted(function(end) for end in estimate.interval)
        interval = low, high
    return Estimate(function(estimate.value), interval, estimate.seeds)
