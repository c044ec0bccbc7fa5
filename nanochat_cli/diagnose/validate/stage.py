"""What a stage of `nanochat validate` is: a check that returns what it measured, or raises ValidationFailure.

Knows nothing of what is checked. A Workspace is handed from stage to stage: a folder, and what earlier stages left in
it for those that need them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from nanochat_cli.report.reporter import QuietReporter, Reporter

Verdict = Literal["passed", "failed", "not here", "not run"]


class Value(NamedTuple):
    """One number of a stage."""

    metric: str
    value: float
    unit: str


@dataclass(frozen=True)
class Figure:
    """What a stage measured. text: for people, one line; values: its numbers; details: more of them, for `--json`."""

    text: str
    values: Sequence[Value]
    details: Mapping[str, object] = field(default_factory=dict)


class NotHere(Exception):
    """A stage needs a part that is not installed; the message says which, and how to install it."""


class Muted(QuietReporter):
    """For what the stages run: nothing is printed, warnings are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)

    def write(self, text: str) -> None:
        pass


@dataclass
class Workspace:
    """folder: for files, empty at first; quick: leave out what `Stage.left_out` says; passed: names of stages.

    reporter: for the progress of a stage that takes long.
    """

    folder: Path
    quick: bool = False
    reporter: Reporter = field(default_factory=Muted)
    passed: set[str] = field(default_factory=set)

    @property
    def corpus(self) -> Path:
        """Text files, written by the stage `tokenizer` or `train`, whichever comes first."""
        return self.folder / "corpus"

    @property
    def run(self) -> Path:
        """Of the stage `train`."""
        return self.folder / "runs" / "whole"

    @property
    def gguf(self) -> Path:
        """Of the stage `export`."""
        return self.folder / "model.gguf"


@dataclass(frozen=True)
class Stage:
    """name: as `--json` has it; needs: stages that must have passed; left_out: what `--quick` leaves out of it.

    all_threads: the others compute on one, since models so small take longer on several.
    """

    name: str
    check: Callable[[Workspace], Figure]
    needs: tuple[str, ...] = ()
    left_out: str = ""
    all_threads: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. text: what it measured, or why it did not; figure: None unless it passed."""

    name: str
    verdict: Verdict
    seconds: float
    text: str
    figure: Figure | None = None
