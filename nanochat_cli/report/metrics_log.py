"""The measurements of a run, step by step: `metrics.jsonl`, and the same numbers for TensorBoard.

Knows files, names and numbers. One JSON object per line and per step: `{"step": 10, "tokens": 20480, "seconds": 3.1,
"loss/train": 5.2, …}`. A name with a "/" is also a TensorBoard scalar (`loss/*`, `eval/*`, `training/*`,
`throughput/*`, `ternary/*`). No torch; TensorBoard is imported when the first scalar is written.

Several lines may have the same step (training, then evaluation). After a resume the file holds exactly what an
uninterrupted run would hold, apart from timings: log a step before the checkpoint of that step is saved.
"""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from nanochat_cli.atomic_write import write_all
from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from nanochat_cli.report.tracker import Tracker

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

Value = float | int | str | None | list[float]


class MetricsLog:
    """Appends to the metrics of a run; `with MetricsLog(run_dir, tensorboard=True) as log: log.log(10, {…})`.

    resumed_step: the step of the checkpoint that the run continues from. Lines after it are cut from the file, and
    TensorBoard is told to forget them. None starts an empty file. run_dir: None, for a process that is not to write,
    drops everything. tracker: gets the scalars too. Raises DataError if the file cannot be written.
    """

    def __init__(
        self,
        run_dir: Path | None,
        tensorboard: bool,
        resumed_step: int | None = None,
        tracker: "Tracker | None" = None,
    ) -> None:
        self._path = Path(os.devnull) if run_dir is None else Path(run_dir) / FILE_NAME
        self._tensorboard_dir = Path(run_dir) / TENSORBOARD_FOLDER if tensorboard and run_dir is not None else None
        self._events: EventFileWriter | None = None
        self._resumed_step = resumed_step
        self._tracker = tracker
        try:
            if run_dir is not None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                _truncate_after(self._path, resumed_step)
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def log(self, step: int, metrics: Mapping[str, Value]) -> None:
        """Write one line. A number that is not finite is written as null: JSON has no NaN."""
        line = {"step": step, **{name: _finite(value) for name, value in metrics.items()}}
        try:
            write_all(self._file, (json.dumps(line, allow_nan=False, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        scalars = {
            name: float(value)
            for name, value in metrics.items()
            if "/" in name and isinstance(value, int | float) and not isinstance(value, bool)
        }
        if scalars and self._tensorboard_dir is not None:
            self._write_events(self._tensorboard_dir, step, scalars)
        if scalars and self._tracker is not None:
            self._tracker.log(step, scalars)

    def sync(self) -> None:
        """Flush everything logged so far to the disk: call it before a checkpoint of the step is saved."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error) from error

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._tracker is not None:
            self._tracker.finish()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_events(self, folder: Path, step: int, scalars: Mapping[str, float]) -> None:
        # protobuf creates these classes on import, which no type checker sees
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            self._events = EventFileWriter(str(folder))
            if self._resumed_step is not None:
                # This makes TensorBoard drop events of this and later steps that an earlier process wrote.
                start = SessionLog(status=SessionLog.START)
                self._events.add_event(Event(wall_time=time.time(), step=self._resumed_step + 1, session_log=start))
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file (or of the run folder that holds it) in order; a half-written last line is left out.

    Raises DataError if the file is missing, or if any other line is not a JSON object with a step.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; is it the folder of a run?") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append(record)
        elif number < len(lines):
            raise DataError(f"{path}:{number}: not a JSON object with a step; the file is damaged")
    return records


def series(records: Iterable[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
    """The pairs (x, y) of the records that have a number for both."""
    pairs = [(record[x], record[y]) for record in records if record.get(x) is not None and record.get(y) is not None]
    return [float(pair[0]) for pair in pairs], [float(pair[1]) for pair in pairs]


def _parse(line: bytes) -> dict[str, Any] | None:
    """A complete line as a record; None if it is cut off or not a record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate_after(path: Path, step: int | None) -> None:
    """Cut the file before the first line that is damaged or of a later step than `step`; None empties it."""
    if not path.exists():
        return
    end = 0
    if step is not None:
        with path.open("rb") as file:
            for line in file:
                record = _parse(line)
                if record is None or record["step"] > step:
                    break
                end += len(line)
    os.truncate(path, end)


def _finite(value: Value) -> Value:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write {path}: {error.strerror}; free space or choose another run.dir")
