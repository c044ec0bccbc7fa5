"""Paired comparisons of matched runs over seeds, with an interval.

From ENOUGH_FOR_INTERVAL seeds on, the interval is a bootstrap interval of the mean. With fewer, resampling cannot
support a confidence level, and the interval is the range of the seeds, from smallest to largest.

Runs of the same seed have the same data in the same order and, if shapes agree, the same initial weights, so they are
compared pair by pair. Knows numbers only.
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
    """interval: by `seed_interval`; None with fewer than two seeds."""

    value: float
    interval: tuple[float, float] | None
    seeds: int


def bootstrap_interval(
    values: Sequence[float], *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the mean (Efron & Tibshirani 1993, §13); None with fewer than two values.

    The same values give the same interval. With a few values it is too narrow: for three it is never wider than their
    range.
    """
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[drawn].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def seed_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The range of a few values, or the bootstrap interval at LEVEL of the mean of many; None for a single value."""
    if len(values) < 2:
        return None
    return bootstrap_interval(values) if len(values) >= ENOUGH_FOR_INTERVAL else (min(values), max(values))


def interval_name(seeds: int) -> str:
    """The right name for `seed_interval` of so many values."""
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
    """The estimate on another scale, by a monotone function."""
    interval = None
    if estimate.interval is not None:
        low, high = sorted(function(end) for end in estimate.interval)
        interval = low, high
    return Estimate(function(estimate.value), interval, estimate.seeds)
