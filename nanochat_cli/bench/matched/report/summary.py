"""The runs of a suite by configuration: means and ranges over seeds, and differences from the baseline.

Knows records and arithmetic, no layout. Only finished runs count; a measure that no finished run has is absent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, RunRecord, Suite


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of `count` values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class ConfigSummary:
    """One configuration. runs: by seed, with any status.

    measures: over finished seeds, by name. differences: own value − the baseline's with the same seed, over the seeds
    that both finished; empty for the baseline itself.
    """

    config: str
    runs: list[RunRecord]
    measures: Mapping[str, Spread]
    differences: Mapping[str, Spread]

    @property
    def finished(self) -> list[RunRecord]:
        return [run for run in self.runs if run.status == FINISHED]

    def mean(self, name: str) -> float | None:
        spread = self.measures.get(name)
        return None if spread is None else spread.mean


def summarise_configs(suite: Suite) -> list[ConfigSummary]:
    """One summary per configuration, the baseline first."""
    baseline = _finished(suite.of(suite.baseline))
    summaries = []
    for config in suite.configs:
        own = _finished(suite.of(config))
        paired = [] if config == suite.baseline else [seed for seed in own if seed in baseline]
        differences = _spreads([_difference(own[seed], baseline[seed]) for seed in paired])
        summaries.append(ConfigSummary(config, suite.of(config), _spreads(list(own.values())), differences))
    return summaries


def _finished(runs: Iterable[RunRecord]) -> dict[int, Mapping[str, float | None]]:
    """The measures of finished runs, by seed."""
    return {run.seed: run.measures for run in runs if run.status == FINISHED}


def _difference(ours: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float]:
    return {
        name: value - peer
        for name, value in ours.items()
        if value is not None and (peer := theirs.get(name)) is not None
    }


def _spreads(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Spread]:
    """The spread of every measure over the runs that have it."""
    spreads = {}
    for name in MEASURES:
        if known := [value for run in runs if (value := run.get(name)) is not None]:
            # Rounding must not put a mean outside the range of its values.
            mean = min(max(sum(known) / len(known), min(known)), max(known))
            spreads[name] = Spread(mean, min(known), max(known), len(known))
    return spreads
