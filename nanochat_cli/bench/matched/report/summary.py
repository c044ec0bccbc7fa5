"""The runs of a suite put together by configuration: means and ranges over seeds, and differences to the baseline.

Knows records and arithmetic, no layout. Only finished runs count; a measure that no finished run has is absent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nanochat_cli.bench.matched.records import FINISHED, MEASURES, RunRecord, Suite


@dataclass(frozen=True)
class Spread:
    """Mean, smallest and largest of `count` values."""

    mean: float
    low: float
    high: float
    count: int


@dataclass(frozen=True)
class ConfigSummary:
    """One configuration. runs: by seed, of every status.

    measures: over finished seeds, by name. differences: own value − that of the baseline with the same seed, over the
    seeds that both have; empty for the baseline itself.
    """

    config: str
    runs: list[RunRecord]
    measures: Mapping[str, Spread]
    differences: Mapping[str, Spread]

    @property
    def finished(self) -> list[RunRecord]:
        return [run for run in self.runs if run.status == FINISHED]


def summarise_configs(suite: Suite) -> list[ConfigSummary]:
    """One summary per configuration, the baseline first."""
    baseline = _finished_by_seed(suite.of(suite.baseline))
    found = []
    for config in suite.configs:
        runs = suite.of(config)
        own = _finished_by_seed(runs)
        pairs = [] if config == suite.baseline else [(own[seed], baseline[seed]) for seed in own if seed in baseline]
        measures = {name: spread(run.measures.get(name) for run in own.values()) for name in MEASURES}
        differences = {name: spread(_difference(ours, theirs, name) for ours, theirs in pairs) for name in MEASURES}
        found.append(ConfigSummary(config, runs, _without_none(measures), _without_none(differences)))
    return found


def spread(values: Iterable[float | None]) -> Spread | None:
    """Over the values that are not None; None when there is none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    # A mean that is rounded out of the range of its values would be a false statement about them.
    mean = min(max(sum(known) / len(known), min(known)), max(known))
    return Spread(mean, min(known), max(known), len(known))


def _finished_by_seed(runs: Iterable[RunRecord]) -> dict[int, RunRecord]:
    return {run.seed: run for run in runs if run.status == FINISHED}


def _difference(ours: RunRecord, theirs: RunRecord, name: str) -> float | None:
    own, other = ours.measures.get(name), theirs.measures.get(name)
    return None if own is None or other is None else own - other


def _without_none(values: Mapping[str, Spread | None]) -> dict[str, Spread]:
    return {name: value for name, value in values.items() if value is not None}
