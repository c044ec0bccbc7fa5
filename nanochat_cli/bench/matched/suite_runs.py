"""Starts the process of one run of a suite, follows what the run writes, and reports how it ended.

Knows processes, `metrics.jsonl` and signals. The process itself is `bench.matched.suite_child`; the display is
`bench.matched.suite_view`.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.bench.matched.measures import RunOutcome
from nanochat_cli.bench.matched.run_record import FAILED, INTERRUPTED
from nanochat_cli.bench.matched.suite_child import PARENT, read_outcome, write_outcome
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import config_to_toml
from nanochat_cli.config.schema import Config
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.metrics_log import FILE_NAME

POLL_SECONDS = 0.2
ENDS_WITHIN = 60.0
"""Seconds that a run gets to save everything when it is asked to stop."""


@dataclass
class Reading:
    """Progress of the current run.

    total_steps: 0 if the clock ends the run. memory: bytes, the peak of its resident set so far.
    """

    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    memory: int | None = None


@dataclass(frozen=True)
class Place:
    """The files about one run, in the folder of a suite."""

    folder: Path
    name: str

    @property
    def outcome(self) -> Path:
        return self.folder / "outcomes" / f"{self.name}.json"

    @property
    def config(self) -> Path:
        return self.folder / "configs" / f"{self.name}.toml"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"

    def prepare(self, config: Config) -> None:
        """Write the process's configuration, and delete the outcome of an earlier process."""
        for path in (self.outcome, self.config, self.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.outcome.unlink(missing_ok=True)
        write_atomically(self.config, config_to_toml(config).encode())

    def record(self, outcome: RunOutcome) -> None:
        self.outcome.parent.mkdir(parents=True, exist_ok=True)
        write_outcome(self.outcome, outcome)


def run_in_process(
    place: Place, config: Config, update: Callable[[Reading], None], stop_requested: Callable[[], bool]
) -> RunOutcome:
    """Train `config`, or continue it, in a separate process; `update` is called a few times per second.

    When a stop is requested, the process saves and ends, and the outcome is `interrupted`.
    """
    place.prepare(config)
    total_steps = config.train.total_steps if config.train.time_budget is None else 0
    tail = _Tail(config.run.dir / str(config.run.name) / FILE_NAME, Reading(total_steps=total_steps))
    utilisation = _GPUUtilisation(config)
    command = [sys.executable, "-m", "nanochat_cli.bench.matched.suite_child", str(place.config), str(place.outcome)]
    with (
        place.log.open("ab") as log,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, PARENT: str(os.getpid())},
            process_group=0,  # a terminal sends Ctrl-C to the parent's group; the parent passes it on, once
        ) as process,
    ):
        try:
            while process.poll() is None and not stop_requested():
                time.sleep(POLL_SECONDS)
                tail.read()
                tail.reading.memory = _peak_of(process.pid) or tail.reading.memory
                utilisation.sample(training=tail.reading.step > 0)
                update(tail.reading)
            stopped = process.poll() is None
            if stopped:
                process.terminate()
                process.wait(ENDS_WITHIN)
        finally:
            process.kill()
    tail.read()
    update(tail.reading)
    outcome = read_outcome(place.outcome)
    if outcome is None:
        outcome = RunOutcome(INTERRUPTED, "stopped") if stopped else RunOutcome(FAILED, _how(process.returncode, place))
    outcome = replace(outcome, gpu_utilisation=utilisation.mean())
    place.record(outcome)
    return outcome


def _how(code: int, place: Place) -> str:
    """How a process ended that left no outcome."""
    log = place.log.relative_to(place.folder)
    if code < 0:
        name = signal.Signals(-code).name
        why = ", perhaps for lack of memory" if code == -signal.SIGKILL else ""
        return f"its process was killed by {name}{why} ({log})"
    return f"its process ended with exit code {code} ({log})"


def _peak_of(pid: int) -> int | None:
    try:
        return peak_memory(pid)
    except OSError:  # the process has ended
        return None


class _Tail:
    """Reads what is appended to a metrics file, which may be truncated or missing at first."""

    def __init__(self, path: Path, reading: Reading) -> None:
        self.reading = reading
        self._path = path
        self._position = 0

    def read(self) -> None:
        """Read new complete lines."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:  # a resumed run has truncated the file
                    self._position = 0
                file.seek(self._position)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._take(parse_json(line))
                    self._position += len(line)
        except FileNotFoundError:
            pass
        except ValueError:  # truncated and grown again, so that this is the middle of a line
            self._position = 0

    def _take(self, record: dict[str, Any]) -> None:
        reading = self.reading
        reading.step = record["step"]
        reading.loss = record.get("loss/main", reading.loss)
        reading.tokens_per_second = record.get("throughput/tokens_per_second", reading.tokens_per_second)
        reading.bits_per_byte = record.get("eval/bits_per_byte", reading.bits_per_byte)


class _GPUUtilisation:
    """Samples nvidia-smi's GPU utilisation; does nothing without nvidia-smi or when training on the CPU."""

    EVERY = 1.0

    def __init__(self, config: Config) -> None:
        self._command = None if config.train.device == "cpu" else shutil.which("nvidia-smi")
        self._next = 0.0
        self._samples: list[float] = []

    def sample(self, *, training: bool) -> None:
        now = time.monotonic()
        if self._command is None or not training or now < self._next:
            return
        self._next = now + self.EVERY
        query = [self._command, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-i", "0"]
        asked = subprocess.run(query, capture_output=True, text=True, check=False)
        if asked.returncode == 0 and asked.stdout.strip().isdigit():
            self._samples.append(int(asked.stdout) / 100)

    def mean(self) -> float | None:
        return statistics.mean(self._samples) if self._samples else None
