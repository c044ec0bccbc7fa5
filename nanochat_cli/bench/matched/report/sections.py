"""The order and the words of a comparison report, before it becomes Markdown or HTML.

Knows which table and which picture belong under which heading. A section without content is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.claims import TUNING
from nanochat_cli.bench.matched.report import tables
from nanochat_cli.bench.matched.report.configs import Settings, differences_table
from nanochat_cli.bench.matched.report.hparams import FOLDER as HPARAMS
from nanochat_cli.bench.matched.report.notes import NOTES
from nanochat_cli.bench.matched.report.summary import ConfigSummary
from nanochat_cli.bench.matched.report.tables import Table, plain_value
from nanochat_cli.bench.matched.run_record import REPORT_FILE, Suite
from nanochat_cli.report.statistics import interval_name

_ENVIRONMENT = ("date", "device", "cpu", "cores", "git", "versions")
_HIDDEN = (NOTES, TUNING)
_ALT = {
    "tokens": "held-out bits per byte over training tokens",
    "seconds": "held-out bits per byte over training time",
    "memory": "optimizer state and peak memory of every configuration",
    "step": "what a step of every configuration is made of",
    "claims": "measured interval and expected range of every claim",
}


@dataclass(frozen=True)
class Section:
    """A heading and its content. pictures: (description, file); folded: shown on demand, where the format can."""

    title: str
    text: list[str] = field(default_factory=list)
    table: Table | None = None
    pictures: list[tuple[str, Path]] = field(default_factory=list)
    folded: bool = False


def title_of(suite: Suite) -> str:
    """The heading of the whole report."""
    others = [config for config in suite.configs if config != suite.baseline]
    return f"{suite.suite}: {', '.join(others)} against {suite.baseline}" if others else suite.suite


def sections_of(
    suite: Suite, summaries: Sequence[ConfigSummary], settings: Mapping[str, Settings], pictures: Mapping[str, Path]
) -> list[Section]:
    """settings: by folder of the run, as far as known. pictures: as `write_pictures` returns them."""

    def drawn(*names: str) -> list[tuple[str, Path]]:
        return [(_ALT[name], pictures[name]) for name in names if name in pictures]

    text = (
        "Means over the finished seeds, with the smallest and largest in brackets. − baseline: bits per byte minus "
        "those of the baseline with the same seed; below 0 is better. They are of held-out documents and of the main "
        "loss alone."
    )
    sections = [Section("Runs", [text], tables.runs_table(summaries), drawn("tokens", "seconds"))]
    if suite.claims:
        interval = interval_name(max(claim.seeds or 0 for claim in suite.claims))
        text = f"A dot is the measured value, a line the {interval}, green the range that was expected."
        sections.append(Section("Claims", [text], tables.claims_table(suite.claims), drawn("claims")))
    if (tuned := suite.settings.get(TUNING)) is not None:
        text = (
            f"Bits per byte after {tuned['steps']} steps on a seed of its own, at each {tuned['key']} that was tried; "
            "every configuration is compared at its best."
        )
        sections.append(Section("Learning rates", [text], tables.rates_table(tuned)))
    if len((step := tables.step_table(summaries)).columns) > 1:
        sections.append(Section("Time of a step", [], step, drawn("step")))
    if drawn("memory"):
        sections.append(Section("Memory", [], None, drawn("memory")))
    if (unfinished := tables.unfinished_table(suite)).rows:
        sections.append(Section("Runs that did not finish", [], unfinished))
    sections += [
        _differences(suite, settings),
        Section("Every run", [], tables.folders_table(suite), folded=True),
        Section("Every measure", [], tables.measures_table(summaries), folded=True),
    ]
    if about := {key: value for key, value in suite.settings.items() if key not in _HIDDEN}:
        sections.append(Section("Settings", [], _pairs("setting", about), folded=True))
    environment = {key: suite.environment.get(key) for key in _ENVIRONMENT}
    text = f"{REPORT_FILE} has every number; TensorBoard shows the runs side by side: tensorboard --logdir {HPARAMS}"
    return [
        *sections,
        Section("Environment", [], _pairs("what", environment), folded=True),
        Section("Files", [text]),
    ]


def _differences(suite: Suite, settings: Mapping[str, Settings]) -> Section:
    table = differences_table(suite, settings)
    text = []
    if missing := [run.run for run in suite.runs if run.run not in settings]:
        text.append(f"Without a readable config.toml, and so left out: {', '.join(missing)}.")
    if not table.rows and settings:
        text.append("Nothing differs but name, folder and seed.")
    return Section("What differs", text, table if table.rows else None)


def _pairs(what: str, values: Mapping[str, Any]) -> Table:
    return Table(
        [what, "value"], [[name, plain_value(value)] for name, value in _flat(values, "") if value is not None]
    )


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return rows
