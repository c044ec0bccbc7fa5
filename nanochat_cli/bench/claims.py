"""Claims about the methods, as data, and what a suite's runs say about each.

`presets/e3/claims.toml` holds them. A claim is supported when the conservative end of its interval reaches what was
expected; it is not measurable here when a run or a number that it needs is missing in any seed. The verdict names the
number of seeds when there are fewer than ENOUGH_SEEDS.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nanochat_cli.bench.records import FINISHED, MEASURES, RunRecord, Suite
from nanochat_cli.bench.result_file import Claim
from nanochat_cli.bench.statistics import Estimate, Form, compare
from nanochat_cli.config.files import read_toml
from nanochat_cli.config.presets import presets_folder
from nanochat_cli.errors import ConfigError

CLAIMS_FILE = "e3/claims.toml"
ENOUGH_SEEDS = 3
SUPPORTED, NOT_SUPPORTED, NOT_MEASURABLE = "supported", "not supported", "not measurable here"
_NEVER_REACHED = ("tokens_to_baseline", "seconds_to_baseline")


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
    form: Form
    direction: Literal["at least", "at most"]
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "ClaimSpec":
        if self.measure not in MEASURES:
            raise ValueError(f"measure = {self.measure} is none of {', '.join(MEASURES)}")
        if (self.peer is None) != (self.form == "value"):
            raise ValueError(f"form = {self.form} {'needs a' if self.peer is None else 'has no'} peer")
        if self.bound is None:
            raise ValueError(f"direction = {self.direction} needs {'low' if self.direction == 'at least' else 'high'}")
        return self

    @property
    def bound(self) -> float | None:
        """What the conservative end must reach."""
        return self.low if self.direction == "at least" else self.high

    @property
    def unit(self) -> str:
        if self.form in ("ratio", "saving"):
            return "×" if self.form == "ratio" else "share"
        return MEASURES[self.measure].unit

    @property
    def expected(self) -> str:
        beyond = self.high if self.direction == "at least" else None
        return f"{self.direction} {self.bound:g}{'' if beyond is None else f', up to {beyond:g}'} {self.unit}".rstrip()


def load_claims(path: Path | None = None) -> list[ClaimSpec]:
    """The claims of a file, by default the suite's own. Raises ConfigError."""
    path = path or presets_folder() / CLAIMS_FILE
    tables = read_toml(path, what="claims").get("claim")
    if not isinstance(tables, list):
        raise ConfigError(f"{path}: has no [[claim]]")
    found = []
    for number, table in enumerate(tables, start=1):
        try:
            found.append(ClaimSpec.model_validate(table))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"{path}, claim {number}: {f'{where}: ' if where else ''}{problem['msg']}") from None
    return found


def judge(spec: ClaimSpec, suite: Suite) -> Claim:
    """What the runs of a suite say about one claim, seed by seed."""
    estimate = _estimate(spec, suite)
    if isinstance(estimate, str):
        return _claim(spec, measured=estimate, verdict=NOT_MEASURABLE)
    low, high = estimate.interval or (estimate.value, estimate.value)
    bound = spec.bound
    assert bound is not None, "validated"
    reached = low >= bound if spec.direction == "at least" else high <= bound
    verdict = SUPPORTED if reached else NOT_SUPPORTED
    if estimate.seeds < ENOUGH_SEEDS:
        verdict += f" ({estimate.seeds} seed{'s' if estimate.seeds > 1 else ''} only)"
    measured = f"{estimate.value:.4g} {spec.unit}".rstrip()
    return _claim(spec, measured=measured, verdict=verdict, estimate=estimate)


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


def _estimate(spec: ClaimSpec, suite: Suite) -> Estimate | str:
    """The comparison over all seeds, or why there is none, in words."""
    configs = [spec.config] if spec.peer is None else [spec.config, spec.peer]
    columns: list[list[float]] = []
    for config in configs:
        values = _values(config, suite.of(config), spec.measure)
        if isinstance(values, str):
            return values
        columns.append(values)
    if len({len(column) for column in columns}) > 1:
        return f"{spec.config} and {spec.peer} have not run with the same seeds"
    smaller_is_better = MEASURES[spec.measure].smaller_is_better
    try:
        return compare(
            columns[0],
            columns[1] if len(columns) > 1 else None,
            spec.form,
            smaller_is_better=smaller_is_better,
        )
    except ValueError as error:
        return str(error)


def _values(config: str, runs: Sequence[RunRecord], measure: str) -> list[float] | str:
    """Of every seed; why not, in words, when one has none: leaving it out would choose the seeds that suit."""
    if not runs:
        return f"{config} was not run"
    if broken := [run for run in runs if run.status != FINISHED]:
        return f"{config} with seed {broken[0].seed}: {broken[0].status}"
    values = [value for run in runs if (value := run.measures.get(measure)) is not None]
    if len(values) == len(runs):
        return values
    if measure in _NEVER_REACHED:
        return f"{config} reached the baseline's bits per byte with {len(values)} of {len(runs)} seeds"
    return f"{config}: {MEASURES[measure].title} was not measured"
