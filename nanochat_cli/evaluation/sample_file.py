"""The completions of an evaluation on disk: one JSON line per problem and temperature, and the settings behind them.

Every line is synced; a last line that a crash left unfinished is dropped. So a killed evaluation continues with the
next problem as if it had never stopped. Only one process may write.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from nanochat_cli.atomic_write import write_all, write_atomically
from nanochat_cli.errors import ConfigError, DataError, reason
from nanochat_cli.nesting import parse_json

SAMPLES = "samples.jsonl"
SETTINGS = "settings.json"

Key = tuple[float, str]
"""(temperature, id of the problem)."""


class SampleFile:
    """The lines of `folder`, by key; a context manager that holds the file.

    settings: everything that the completions depend on. Raises ConfigError when there are completions already and
    `resume` is off, or when they were drawn with other settings, and DataError when files cannot be read or written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        self.path = folder / SAMPLES
        self.records: dict[Key, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}; choose another --out") from error
        try:
            self._lock()
            self._read()
            self._check(dict(settings), resume)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, record: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        try:
            write_all(self._file, json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}; free space, then --resume") from error
        self.records[record["temperature"], record["problem"]] = record

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{self.path}: another evaluation writes to it; wait or choose another --out") from None

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = parse_json(line.decode("utf-8", "surrogatepass"))
                self.records[record["temperature"], record["problem"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}:{number}: not a line of completions ({error}); remove it") from error

    def _check(self, settings: dict[str, Any], resume: bool) -> None:
        path = self.folder / SETTINGS
        if self.records:
            if not resume:
                raise ConfigError(
                    f"{self.folder} holds an evaluation: continue it with --resume, or choose another --out"
                )
            try:
                saved = parse_json(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read ({reason(error)}); choose another --out") from error
            for key, value in settings.items():
                if saved.get(key) != value:
                    raise ConfigError(
                        f"{self.folder} was evaluated with {key} = {saved.get(key)}, not {value}: "
                        "use the same value, or choose another --out"
                    )
            return
        try:
            write_atomically(path, (json.dumps(settings, indent=1, ensure_ascii=False) + "\n").encode())
        except OSError as error:
            raise DataError(f"{path}: cannot be written: {error.strerror}; choose another --out") from error
