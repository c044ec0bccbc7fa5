"""The order and the words of a comparison report, before it is Markdown or HTML.

Knows which table and which picture belong to which heading. A section with nothing in it is left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.claims import TUNING
from nanochat_cli.bench.matched.records import FINISHED, REPORT_FILE, Suite
from nanochat_cli.bench.matched.report import tables as tables
from nanochat_cli.bench.matched.report.configs import Settings, differences_table
from nanochat_cli.bench.matched.report.environments import environment_notes
from nanochat_cli.bench.matched.report.hparams import FOLDER as HPARAMS
from nanochat_cli.bench.matched.report.summary import summarise_configs
from nanochat_cli.bench.matched.report.tables import Table, plain_value
from nanochat_cli.report.statistics import interval_name

NOTES = "notes"
"""Key of `settings`: sentences about the comparison that a reader has to know, shown on top."""
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
    """One heading with what stands under it. pictures: (description, file); folded: for whoever looks it up."""

    title: str
    text: list[str] = field(default_factory=list)
    table: Table | None = None
    pictures: list[tuple[str, Path]] = field(default_factory=list)
    folded: bool = False


def title_of(suite: Suite) -> str:
    """The heading of the whole report."""
    others = [config for config in suite.configs if config != suite.baseline]
    return f"{suite.suite}: {', '.join(others)} against {suite.baseline}" if others else suite.suite


def notes_of(suite: Suite) -> list[str]:
    """What has to be known before the numbers: notes of whoever made the suite, and what is missing."""
    notes = [str(note) for note in suite.settings.get(NOTES, ())]
    finished = sum(run.status == FINISHED for run in suite.runs)
    if finished < len(suite.runs):
        notes.append(f"{len(suite.runs) - finished} of {len(suite.runs)} runs did not finish: no mean has them in it.")
    finished_baseline = any(run.status == FINISHED for run in suite.of(suite.baseline))
    if not finished_baseline:
        notes.append(f"No run of the baseline {suite.baseline} finished: there is nothing to compare with.")
    alone = [
        summary.config
        for summary in summarise_configs(suite)
        if summary.finished and not summary.differences and summary.config != suite.baseline
    ]
    if alone and finished_baseline:
        notes.append(f"{', '.join(alone)}: no seed in common with {suite.baseline}, and so no paired difference.")
    if max((len(summary.finished) for summary in summarise_configs(suite)), default=0) == 1:
        notes.append("One seed per configuration: a difference says nothing about how much of it is chance.")
    return notes + environment_notes(suite)


def sections_of(suite: Suite, settings: Mapping[str, Settings], pictures: Mapping[str, Path]) -> list[Section]:
    """settings: by folder of the run, as far as they are known. pictures: as `write_pictures` returns them."""

    def drawn(*names: str) -> list[tuple[str, Path]]:
        return [(_ALT[name], pictures[name]) for name in names if name in pictures]

    summaries = summarise_configs(suite)
    found = [
        Section(
            "Runs",
            [
                "Means over the finished seeds, with the smallest and largest in brackets. − baseline: bits per byte "
                "minus those of the baseline with the same seed; below 0 is better. They are of held-out documents "
                "and of the main loss alone.",
            ],
            tables.runs_table(summaries),
            drawn("tokens", "seconds"),
        )
    ]
    if suite.claims:
        interval = interval_name(max(claim.seeds or 0 for claim in suite.claims))
        text = f"A dot is the measured value, a line the {interval}, green the range that was expected."
        found.append(Section("Claims", [text], tables.claims_table(suite.claims), drawn("claims")))
    if (tuned := suite.settings.get(TUNING)) is not None:
        text = (
            f"Bits per byte after {tuned['steps']} steps on a seed of its own, at each {tuned['key']} that was tried; "
            "every configuration is compared at its best."
        )
        found.append(Section("Learning rates", [text], tables.rates_table(tuned)))
    if len((step := tables.step_table(summaries)).columns) > 1:
        found.append(Section("Time of a step", [], step, drawn("step")))
    if drawn("memory"):
        found.append(Section("Memory", [], None, drawn("memory")))
    if (unfinished := tables.unfinished_table(suite)).rows:
        found.append(Section("Runs that did not finish", [], unfinished))
    found.append(_differences(suite, settings))
    found.append(Section("Every run", [], tables.folders_table(suite), folded=True))
    found.append(Section("Every measure", [], tables.measures_table(summaries), folded=True))
    about = {key: value for key, value in suite.settings.items() if key not in _HIDDEN}
    if about:
        found.append(Section("Settings", [], _pairs("setting", about), folded=True))
    environment = {key: suite.environment.get(key) for key in _ENVIRONMENT}
    found.append(Section("Environment", [], _pairs("what", environment), folded=True))
    text = f"{REPORT_FILE} has every number; TensorBoard shows the runs side by side: tensorboard --logdir {HPARAMS}"
    found.append(Section("Files", [text]))
    return found


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
