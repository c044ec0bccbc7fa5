"""What a reader must know before the numbers of a comparison: what is missing, and where the runs differ in machine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanochat_cli.bench.matched.report.summary import ConfigSummary
from nanochat_cli.bench.matched.run_record import FINISHED, Suite
from nanochat_cli.report.environment import BLEMISHES, blemish

NOTES = "notes"
"""Key in a suite's settings: sentences of its author, shown first."""

_FACTS: dict[str, Callable[[Mapping[str, Any]], object]] = {
    "commit": lambda environment: str((environment.get("git") or {}).get("commit"))[:12],
    "machine": lambda environment: environment.get("device"),
    "instruction sets": lambda environment: " ".join(environment.get("cpu_flags") or ()) or None,
    "cores": lambda environment: environment.get("cores"),
    "torch": lambda environment: (environment.get("versions") or {}).get("torch"),
}
_NAMED = 4
"""A note names this many runs and counts the rest."""


def notes_of(suite: Suite, summaries: Sequence[ConfigSummary]) -> list[str]:
    """The suite's own notes, what is missing, and `environment_notes`."""
    notes = [str(note) for note in suite.settings.get(NOTES, ())]
    finished = sum(run.status == FINISHED for run in suite.runs)
    if finished < len(suite.runs):
        notes.append(f"{len(suite.runs) - finished} of {len(suite.runs)} runs did not finish: no mean has them in it.")
    finished_baseline = any(run.status == FINISHED for run in suite.of(suite.baseline))
    if not finished_baseline:
        notes.append(f"No run of the baseline {suite.baseline} finished: there is nothing to compare with.")
    others = [summary for summary in summaries if summary.config != suite.baseline]
    alone = [summary.config for summary in others if summary.finished and not summary.differences]
    if alone and finished_baseline:
        notes.append(f"{', '.join(alone)}: no seed in common with {suite.baseline}, and so no paired difference.")
    if max((len(summary.finished) for summary in summaries), default=0) == 1:
        notes.append("One seed per configuration: a difference says nothing about how much of it is chance.")
    return notes + environment_notes(suite)


def environment_notes(suite: Suite) -> list[str]:
    """A sentence for every fact in which the runs' environments differ, and one for runs that no commit describes.

    Runs without a recorded environment are left out.
    """
    known = [(run.run.rpartition("/")[2], run.environment) for run in suite.runs if run.environment]
    notes = []
    for fact, of in _FACTS.items():
        groups: dict[object, list[str]] = {}
        for name, environment in known:
            groups.setdefault(of(environment), []).append(name)
        if len(groups) > 1:
            parts = [f"{value if value is not None else 'unknown'} ({_names(runs)})" for value, runs in groups.items()]
            notes.append(f"The runs differ in {fact}: {'; '.join(parts)}.")
    blemished = {reason: [name for name, found in known if blemish(found) == reason] for reason in BLEMISHES}
    return notes + [f"Measured with {reason}: {_names(runs)}." for reason, runs in blemished.items() if runs]


def _names(runs: list[str]) -> str:
    rest = len(runs) - _NAMED
    return ", ".join(runs[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
