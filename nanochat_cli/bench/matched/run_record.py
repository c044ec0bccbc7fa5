"""A suite of training runs on disk: `report.json`, with a record of every run beside the results and claims.

Knows names, numbers and their JSON form. Measuring a record is left to `measures`, judging several to `claims`, and
showing them to `report.comparison`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.report.result_file import Claim, Result

REPORT_FILE = "report.json"

FINISHED, DIVERGED, OUT_OF_MEMORY = "finished", "diverged", "out of memory"
FAILED, INTERRUPTED = "failed", "interrupted"
STATUSES = FINISHED, DIVERGED, OUT_OF_MEMORY, FAILED, INTERRUPTED


@dataclass(frozen=True)
class Measure:
    """How a measure of a run is called and read. unit: as in result files; "" for a pure number.

    timed: depends on the load of the machine; learned: depends on the learning rate.
    """

    title: str
    unit: str
    smaller_is_better: bool
    timed: bool = False
    learned: bool = False


MEASURES: dict[str, Measure] = {
    "bits_per_byte": Measure("bits per byte, held-out", "bits/byte", True, learned=True),
    "loss": Measure("loss, held-out", "nats/token", True, learned=True),
    "tokens_to_baseline": Measure("tokens to the baseline's bits per byte", "tokens", True, learned=True),
    "seconds_to_baseline": Measure(
        "training time to the baseline's bits per byte", "s", True, timed=True, learned=True
    ),
    "tokens_per_second": Measure("training rate", "tokens/s", False, timed=True),
    "step_ms": Measure("step", "ms", True, timed=True),
    "forward_ms": Measure("forward pass and loss", "ms", True, timed=True),
    "backward_ms": Measure("backward pass", "ms", True, timed=True),
    "optimizer_ms": Measure("optimizer", "ms", True, timed=True),
    "data_wait_ms": Measure("wait for a batch", "ms", True, timed=True),
    "kept_fraction": Measure("tokens in the backward pass", "share", True),
    "gradient_norm": Measure("gradient norm, median", "", True),
    "steps": Measure("steps", "steps", True),
    "skipped": Measure("skipped steps", "steps", True),
    "peak_memory_bytes": Measure("peak memory of the process", "B", True),
    "optimizer_state_bytes": Measure("optimizer state", "B", True),
    "adamw_state_bytes": Measure("state that AdamW in float32 has for the same parameters", "B", True),
    "busy_fraction": Measure("share of a step that does not wait for data", "share", False),
    "gpu_utilisation": Measure("share of the time in which the GPU ran a kernel", "share", False),
    "gguf_bytes": Measure("GGUF file", "B", True),
    "train_seconds": Measure("training time", "s", True, timed=True),
}
"""Every measure of a run, in the order in which a report shows them."""


@dataclass(frozen=True)
class Point:
    """One evaluation on held-out documents, main loss only. seconds: training time so far; loss: nats per token."""

    step: int
    tokens: int
    seconds: float
    bits_per_byte: float
    loss: float


@dataclass(frozen=True)
class RunRecord:
    """One run of a suite.

    config: "baseline", "mtp-only", ..., or what is varied, such as "optim.lr=3e-4". status: one of STATUSES; reason:
    one line for any status but finished. run: the folder. train: "step", "tokens", "seconds" and "loss" (main loss),
    thinned to equal length. measures: by the names of MEASURES; None if not measured. environment: where the run took
    place, from its own file; empty if unknown.
    """

    config: str
    seed: int
    status: str
    reason: str | None
    run: str
    parameters: int | None
    train: dict[str, list[float]]
    evaluations: list[Point]
    measures: dict[str, float | None]
    environment: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"unknown status {self.status!r}: choose one of {', '.join(STATUSES)}")
        if unknown := self.measures.keys() - MEASURES.keys():
            raise ValueError(f"unknown measures: {', '.join(sorted(unknown))}")


@dataclass(frozen=True)
class Suite:
    """Everything that goes into a report. suite: "e3", "ab" or "compare"; settings: profile, match, baseline, ..."""

    suite: str
    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)

    @property
    def baseline(self) -> str:
        """The configuration with which the others are compared."""
        return self.settings["baseline"]

    @property
    def configs(self) -> list[str]:
        """Configurations in the order of their first run, the baseline first."""
        names = dict.fromkeys(run.config for run in self.runs)
        return sorted(names, key=lambda name: name != self.baseline)

    def of(self, config: str) -> list[RunRecord]:
        """The runs of a configuration, by seed."""
        return sorted((run for run in self.runs if run.config == config), key=lambda run: run.seed)


def write_suite(folder: Path, suite: Suite) -> Path:
    """Write `folder/report.json`. Raises DataError."""
    return write_text(folder / REPORT_FILE, json.dumps(asdict(suite), indent=1, ensure_ascii=False, allow_nan=False))


def write_text(path: Path, text: str) -> Path:
    """Write a file of a suite atomically, with a final line break; returns its path. Raises DataError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (text + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another --out") from error
    return path
