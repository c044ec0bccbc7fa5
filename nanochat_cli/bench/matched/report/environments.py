"""What a reader of a comparison has to know about where its runs ran: when that was not one place, or not a commit.

Knows the environments that runs wrote. A run without one is left out.
"""

from collections.abc import Callable, Mapping
from typing import Any

from nanochat_cli.bench.matched.records import Suite
from nanochat_cli.report.environment import BLEMISHES, blemish

Environment = Mapping[str, Any]
_FACTS: dict[str, Callable[[Environment], object]] = {
    "commit": lambda found: str((found.get("git") or {}).get("commit"))[:12],
    "machine": lambda found: found.get("device"),
    "instruction sets": lambda found: " ".join(found.get("cpu_flags") or ()) or None,
    "cores": lambda found: found.get("cores"),
    "torch": lambda found: (found.get("versions") or {}).get("torch"),
}
_NAMED = 4
"""Runs that a note names of each kind; the rest is a number."""


def environment_notes(suite: Suite) -> list[str]:
    """A sentence for every fact in which the runs differ, and one for runs that no commit describes."""
    known = [(run.run.rpartition("/")[2], run.environment) for run in suite.runs if run.environment]
    notes = []
    for fact, of in _FACTS.items():
        groups: dict[object, list[str]] = {}
        for name, found in known:
            groups.setdefault(of(found), []).append(name)
        if len(groups) > 1:
            parts = [f"{value if value is not None else 'unknown'} ({_names(runs)})" for value, runs in groups.items()]
            notes.append(f"The runs differ in {fact}: {'; '.join(parts)}.")
    blemished = {reason: [name for name, found in known if blemish(found) == reason] for reason in BLEMISHES}
    return notes + [f"Measured with {reason}: {_names(runs)}." for reason, runs in blemished.items() if runs]


def _names(runs: list[str]) -> str:
    rest = len(runs) - _NAMED
    return ", ".join(runs[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
