"""Claims about the methods, as data, and what a suite's runs say about each.

`presets/e3/claims.toml` holds them. A claim is supported when the conservative end of its interval reaches the expected
value. It is not measurable here when a run or number that it needs is missing for any seed, or when `only_if` does not
hold, so that it could only fail or only succeed. A run that never reaches the baseline rules a claim out if what it
spent is already too much. A claim about time is within noise when that end is closer to the
expected value than two runs of one configuration are to each other. The verdict notes fewer than ENOUGH_SEEDS seeds,
and learning rates that matter but were not tuned.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nanochat_cli.bench.matched.noise import noise_floor
from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, RunRecord, Suite
from nanochat_cli.config.presets import presets_folder
from nanochat_cli.config.toml import read_toml
from nanochat_cli.errors import ConfigError
from nanochat_cli.report.result_file import Claim
from nanochat_cli.report.statistics import Estimate, Form, compare

CLAIMS_FILE = "e3/claims.toml"
ENOUGH_SEEDS = 3
SUPPORTED, NOT_SUPPORTED, NOT_MEASURABLE = "supported", "not supported", "not measurable here"
WITHIN_NOISE = "within noise"
TUNING = "tuning"
"""Key in a suite's settings: the learning rates that were tried, if any."""
_SPENT = {"tokens_to_baseline": "tokens", "seconds_to_baseline": "seconds"}
"""Measures of how soon a run reaches the baseline -> what a run that never did has spent, and so needs more than."""


class Condition(BaseModel):
    """What makes a claim judgeable: every run of `config` measures less than `below`. otherwise: why it is not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: str
    measure: str
    below: float
    otherwise: str


class ClaimSpec(BaseModel):
    """One claim of the file; its head comment explains the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    statement: str
    source: str
    scope: str
    config: str
    peer: str | None = None
    measure: str
    peer_measure: str | None = None
    form: Form
    direction: Literal["at least", "at most"]
    low: float | None = None
    high: float | None = None
    only_if: Condition | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "ClaimSpec":
        for measure in (self.measure, self.peer_measure, self.only_if.measure if self.only_if else None):
            if measure is not None and measure not in MEASURES:
                raise ValueError(f"measure = {measure} is unknown: choose one of {', '.join(MEASURES)}")
        if (self.peer is None) != (self.form == "value"):
            raise ValueError(f"form = {self.form} {'needs a' if self.peer is None else 'has no'} peer")
        if self.bound is None:
            raise ValueError(f"direction = {self.direction} needs {'low' if self.direction == 'at least' else 'high'}")
        return self

    @property
    def bound(self) -> float | None:
        """The value that the conservative end must reach."""
        return self.low if self.direction == "at least" else self.high

    @property
    def unit(self) -> str:
        if self.form in ("ratio", "saving"):
            return "×" if self.form == "ratio" else "share"
        return MEASURES[self.measure].unit

    @property
    def expected(self) -> str:
        """The expected range in words, shares as percentages: "10–20 %", "at most 0.01 bits/byte"."""
        scale, unit = (100, "%") if self.unit == "share" else (1, self.unit)
        ends = [f"{scale * end:g}" for end in (self.low, self.high) if end is not None]
        words = "–".join(ends) if len(ends) > 1 else f"{self.direction} {ends[0]}"
        return f"{words} {unit}".rstrip()


def load_claims(path: Path | None = None) -> list[ClaimSpec]:
    """The claims in a file, by default CLAIMS_FILE. Raises ConfigError."""
    path = path or presets_folder() / CLAIMS_FILE
    tables = read_toml(path, what="claims").get("claim")
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: has no [[claim]]")
    claims = []
    for number, table in enumerate(tables, start=1):
        try:
            claims.append(ClaimSpec.model_validate(table))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"{path}, claim {number}: {f'{where}: ' if where else ''}{problem['msg']}") from None
    return claims


def judge(spec: ClaimSpec, suite: Suite) -> Claim:
    """What the runs of a suite say about one claim, seed by seed."""
    estimate = _unmet(spec, suite) or _estimate(spec, suite)
    if isinstance(estimate, str):
        bounded = spec.measure in _SPENT and spec.direction == "at least"
        at_best = _estimate(spec, suite, never_reached="spent") if bounded else estimate
        if isinstance(at_best, str) or _verdict(spec, suite, at_best) != NOT_SUPPORTED:
            return _claim(spec, measured=estimate, verdict=NOT_MEASURABLE)
        return _claim(spec, measured=estimate, verdict=NOT_SUPPORTED + _caveats(spec, suite, at_best))
    measured = _shown(estimate.value, spec.unit)
    if (floor := _noise(spec, suite)) is not None:
        measured += f" (two runs of one configuration differ by up to {floor - 1:.1%})"
    verdict = _verdict(spec, suite, estimate) + _caveats(spec, suite, estimate)
    return _claim(spec, measured=measured, verdict=verdict, estimate=estimate)


def _noise(spec: ClaimSpec, suite: Suite) -> float | None:
    return noise_floor(suite, spec.measure) if MEASURES[spec.measure].timed else None


def _verdict(spec: ClaimSpec, suite: Suite, estimate: Estimate) -> str:
    low, high = estimate.interval or (estimate.value, estimate.value)
    end, bound = (low if spec.direction == "at least" else high), spec.bound
    assert bound is not None, "validated"
    if (floor := _noise(spec, suite)) is not None and _apart(spec, end, bound) < floor:
        return WITHIN_NOISE
    return SUPPORTED if (end >= bound if spec.direction == "at least" else end <= bound) else NOT_SUPPORTED


def _apart(spec: ClaimSpec, end: float, bound: float) -> float:
    """Factor, at least 1, between two values of a claim as ratios of times or rates; inf for claims of another form."""
    ratios = [1 - value if spec.form == "saving" else value for value in (end, bound)]
    if spec.form not in ("ratio", "saving") or min(ratios) <= 0:
        return math.inf
    return max(ratios[0] / ratios[1], ratios[1] / ratios[0])


def _caveats(spec: ClaimSpec, suite: Suite, estimate: Estimate) -> str:
    """The caveats of a verdict, in brackets; empty without any."""
    caveats = []
    if estimate.seeds < ENOUGH_SEEDS:
        caveats.append(f"{estimate.seeds} seed{'s' if estimate.seeds > 1 else ''} only")
    if MEASURES[spec.measure].learned and not suite.settings.get(TUNING):
        caveats.append("learning rates not tuned")
    if MEASURES[spec.measure].timed and _noise(spec, suite) is None:
        caveats.append("noise not measured")
    return f" ({'; '.join(caveats)})" if caveats else ""


def _shown(value: float, unit: str) -> str:
    return f"{100 * value:.4g} %" if unit == "share" else f"{value:.4g} {unit}".rstrip()


def _unmet(spec: ClaimSpec, suite: Suite) -> str | None:
    """Why the claim's condition rules out a judgement here; None if it does not, or if its measure is missing."""
    if (condition := spec.only_if) is None:
        return None
    values = _values(condition.config, suite.of(condition.config), condition.measure)
    if isinstance(values, str) or max(values) < condition.below:
        return None
    measure = MEASURES[condition.measure]
    return f"{condition.config} has {_shown(min(values), measure.unit)} ({measure.title}): {condition.otherwise}"


def _claim(spec: ClaimSpec, *, measured: str, verdict: str, estimate: Estimate | None = None) -> Claim:
    return Claim(
        id=spec.id,
        statement=spec.statement,
        source=f"{spec.source}; measured here: {spec.scope}",
        expected=spec.expected,
        measured=measured,
        verdict=verdict,
        interval=None if estimate is None else estimate.interval,
        seeds=0 if estimate is None else estimate.seeds,
        expected_low=spec.low,
        expected_high=spec.high,
        unit=spec.unit,
    )


def _estimate(spec: ClaimSpec, suite: Suite, never_reached: Literal["missing", "spent"] = "missing") -> Estimate | str:
    """The comparison over all seeds, or the reason why they cannot be compared.

    never_reached: what a run of `config` counts with that never reached the baseline; with what it has spent, the
    estimate is the best that can be true of it.
    """
    sides = [(spec.config, spec.measure)]
    if spec.peer is not None:
        sides.append((spec.peer, spec.peer_measure or spec.measure))
    columns: list[list[float]] = []
    for config, measure in sides:
        spent = never_reached == "spent" and config == spec.config
        values = _values(config, suite.of(config), measure, spent=spent)
        if isinstance(values, str):
            return values
        columns.append(values)
    if len({len(column) for column in columns}) > 1:
        return f"{spec.config} and {spec.peer} have not run with the same seeds"
    smaller_is_better = MEASURES[spec.measure].smaller_is_better
    peers = columns[1] if len(columns) > 1 else None
    try:
        return compare(columns[0], peers, spec.form, smaller_is_better=smaller_is_better)
    except ValueError as error:
        return str(error)


def _values(config: str, runs: Sequence[RunRecord], measure: str, *, spent: bool = False) -> list[float] | str:
    """The measure for every seed, or why one lacks it: leaving that seed out would mean picking the seeds that suit."""
    if not runs:
        return f"{config} was not run"
    if broken := [run for run in runs if run.status != FINISHED]:
        return f"{config} with seed {broken[0].seed}: {broken[0].status}"
    values = [value for run in runs if (value := run.measures.get(measure)) is not None]
    if len(values) == len(runs):
        return values
    if spent and all(run.train.get(_SPENT[measure]) for run in runs):
        reached = [run.measures.get(measure) for run in runs]
        return [
            run.train[_SPENT[measure]][-1] if value is None else value for run, value in zip(runs, reached, strict=True)
        ]
    if measure in _SPENT:
        return f"{config} reached the baseline's bits per byte with {len(values)} of {len(runs)} seeds"
    return f"{config}: {MEASURES[measure].title} was not measured"
