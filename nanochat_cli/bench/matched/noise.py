"""The noise floor of a suite: by how much two runs of one configuration differ in timings.

A suite that runs its baseline twice has pairs with the same seed, which compute the same to the last bit. Otherwise
the seeds of the baseline are compared with each other. A difference below the floor means nothing.
"""

from collections.abc import Sequence
from itertools import combinations

from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, RunRecord, Suite

REPEAT = "baseline-again"
"""Name of the configuration that runs the baseline a second time."""


def noise_floor(suite: Suite, measure: str) -> float | None:
    """Largest factor, at least 1, by which two runs of the baseline differ in `measure`; None without two runs."""
    pairs = _pairs(_known(suite.of(suite.baseline), measure), _known(suite.of(REPEAT), measure))
    return max((max(one / other, other / one) for one, other in pairs), default=None)


def noise_note(suite: Suite) -> str | None:
    """One sentence on the noise of the training rate; None if the suite cannot tell."""
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
