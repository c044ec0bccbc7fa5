"""A stage of `nanochat validate`: a check that returns what it measured, or raises ValidationFailure.

Knows nothing of what is checked. A Workspace is passed from stage to stage: a folder, with what earlier stages left
there for later ones.
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
    """What a stage measured. text: one line for people; values: the numbers; details: more, for `--json` only."""

    text: str
    values: Sequence[Value]
    details: Mapping[str, object] = field(default_factory=dict)


class NotHere(Exception):
    """A stage needs a part that is not installed; the message says which one and how to install it."""


class Muted(QuietReporter):
    """Prints nothing, keeps warnings: for what the stages run."""

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

    reporter: for the progress of a long stage.
    """

    folder: Path
    quick: bool = False
    reporter: Reporter = field(default_factory=Muted)
    passed: set[str] = field(default_factory=set)

    @property
    def corpus(self) -> Path:
        """Text files, written by stage `tokenizer` or `train`, whichever runs first."""
        return self.folder / "corpus"

    @property
    def run(self) -> Path:
        """The run of stage `train`."""
        return self.folder / "runs" / "whole"

    @property
    def gguf(self) -> Path:
        """The file of stage `export`."""
        return self.folder / "model.gguf"


@dataclass(frozen=True)
class Stage:
    """name: as in `--json`; needs: stages that must have passed; left_out: what `--quick` leaves out.

    all_threads: use all of them; other stages compute on one, since such small models are slower on several.
    """

    name: str
    check: Callable[[Workspace], Figure]
    needs: tuple[str, ...] = ()
    left_out: str = ""
    all_threads: bool = False


@dataclass(frozen=True)
class StageOutcome:
    """How a stage ended. text: what it measured, or why not; figure: None unless it passed."""

    name: str
    verdict: Verdict
    seconds: float
    text: str
    figure: Figure | None = None
