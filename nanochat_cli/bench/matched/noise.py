"""The noise floor of a suite: by how much two runs of one configuration differ in what depends on the clock.

A suite that runs its baseline twice has pairs of one seed, whose work is the same to the last bit. Where it does not,
the seeds of the baseline stand in for them. No difference that is finer than the floor says anything.
"""

from collections.abc import Sequence
from itertools import combinations

from nanochat_cli.bench.matched.records import FINISHED, MEASURES, RunRecord, Suite

REPEAT = "baseline-again"
"""Configuration that is the baseline once more."""


def noise_floor(suite: Suite, measure: str) -> float | None:
    """Factor, at least 1, by which runs of the baseline differ in `measure` at most; None where nothing can tell."""
    pairs = _pairs(_known(suite.of(suite.baseline), measure), _known(suite.of(REPEAT), measure))
    return max((max(one / other, other / one) for one, other in pairs), default=None)


def noise_note(suite: Suite) -> str | None:
    """One sentence about the training rate; None for a suite without one."""
    floor = noise_floor(suite, "tokens_per_second")
    if floor is None:
        return None
    pairs = "with the same seed" if suite.of(REPEAT) else "with different seeds"
    title = MEASURES["tokens_per_second"].title
    return (
        f"Noise floor: runs of the baseline {pairs} differ by up to {floor - 1:.1%} in their {title}. No difference "
        "in speed that is finer than this is judged."
    )


def _known(runs: Sequence[RunRecord], measure: str) -> dict[int, float]:
    return {run.seed: value for run in runs if run.status == FINISHED and (value := run.measures.get(measure))}


def _pairs(baseline: dict[int, float], repeat: dict[int, float]) -> list[tuple[float, float]]:
    if repeat:
        return [(baseline[seed], value) for seed, value in repeat.items() if seed in baseline]
    return list(combinations(baseline.values(), 2))
