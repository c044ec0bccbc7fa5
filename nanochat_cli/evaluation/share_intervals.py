"""95 % intervals of means of shares over problems, and of their paired differences.

Resampling problems that all failed claims that they always will. So with few problems, only zeros and ones, or no
spread, the score interval of a proportion is used, with a problem as the unit: of all values in 0..1 with one mean,
zeros and ones spread the most, so that it is rather too wide than too narrow. Knows numbers only.
"""

import math
import statistics
from collections.abc import Sequence

import numpy as np

from nanochat_cli.report.statistics import LEVEL, bootstrap_interval

MANY = 30
"""From this many values on the bootstrap is trusted, if they spread."""
_Z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, doi:10.1080/01621459.1927.10502953, eq. 5) of `count` ≥ 1 values."""
    square = _Z**2 / count
    middle = (mean + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(mean * (1 - mean) / count + square / (4 * count))
    return (0.0 if mean == 0 else max(0.0, middle - half)), (1.0 if mean == 1 else min(1.0, middle + half))


def share_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the mean of values in 0..1, one per problem; None for fewer than two."""
    if len(values) < 2:
        return None
    if _resampled(values):
        return bootstrap_interval(values)
    return wilson_interval(min(1.0, math.fsum(values) / len(values)), len(values))


def difference_interval(after: Sequence[float], before: Sequence[float]) -> tuple[float, float] | None:
    """The interval of mean(after) − mean(before), values in 0..1 of the same problems; None for fewer than two.

    With few problems: from the intervals of both sides and their correlation (Newcombe 1998, Statistics in Medicine
    17:2635, method 10), whose corrected correlation does not conclude from pairs that all agree that they always will.
    """
    if len(after) < 2:
        return None
    changes = [mine - theirs for mine, theirs in zip(after, before, strict=True)]
    if _resampled(changes) and _resampled(after) and _resampled(before):
        return bootstrap_interval(changes)
    sides = [min(1.0, math.fsum(side) / len(side)) for side in (after, before)]
    (low, high), (peer_low, peer_high) = (wilson_interval(mean, len(after)) for mean in sides)
    correlation = _correlation(after, before)
    difference = sides[0] - sides[1]
    below = _distance(sides[0] - low, peer_high - sides[1], correlation)
    above = _distance(high - sides[0], sides[1] - peer_low, correlation)
    return max(-1.0, difference - below), min(1.0, difference + above)


def _resampled(values: Sequence[float]) -> bool:
    return len(values) >= MANY and len(set(values)) > 2


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """For a two-by-two table (ad − bc − n/2) / √…, not below 0 if ad > bc; 0 where a side does not spread."""
    count = len(one)
    spread = float(np.std(one) * np.std(other))
    if spread == 0:
        return 0.0
    covariance = float(np.mean((np.asarray(one) - np.mean(one)) * (np.asarray(other) - np.mean(other))))
    return (max(0.0, covariance - 0.5 / count) if covariance > 0 else covariance) / spread


def _distance(one: float, other: float, correlation: float) -> float:
    return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))
