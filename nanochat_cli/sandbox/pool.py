"""Judge many programs at once: threads that wait for sandboxes, and a cache of verdicts.

A verdict depends on program, tests, limits, isolation and toolchain; a program already judged under all of these is
not run again. Verdicts that the machine's load may have decided (timeouts, kills) are not kept. A program that was
killed from outside is judged once more after all others, so that its neighbours do not decide its verdict.
"""

import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.sandbox.limits import Diagnostic, Outcome, Program
from nanochat_cli.sandbox.sandbox import Sandbox

FORMAT = 4
"""Raised when the same program may get another verdict."""
_DISTURBED = "killed"
_NOT_KEPT = ("timeout", _DISTURBED)


class SandboxPool:
    """Judges programs in `workers` threads, by default one per core. A context manager.

    `cache` is a folder that keeps verdicts between processes (JSON, one file each); without it they last as long as
    the pool. `judged` counts the programs that were run, `reused` the verdicts that were known already.
    """

    def __init__(self, sandbox: Sandbox, workers: int | None = None, cache: Path | None = None) -> None:
        self.sandbox = sandbox
        self.judged = self.reused = 0
        self._executor = ThreadPoolExecutor(workers or os.cpu_count() or 1, thread_name_prefix="sandbox")
        self._folder = cache
        self._known: dict[str, Outcome] = {}
        self._lock = threading.Lock()
        if cache is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"{cache}: cannot create the cache: {error.strerror}; choose another folder") from error

    def __enter__(self) -> "SandboxPool":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def judge_all(self, programs: Sequence[Program], reporter: Reporter | None = None) -> list[Outcome]:
        """Outcomes in the order of `programs`; equal programs run once. Raises what `Sandbox.judge` raises."""
        keys = [self.key(program) for program in programs]
        first = dict(zip(keys, programs, strict=True))
        futures = {key: self._executor.submit(self._outcome, key, program) for key, program in first.items()}
        try:
            if reporter is None:
                outcomes = {key: future.result() for key, future in futures.items()}
            else:
                outcomes = {}
                with reporter.progress("judging programs", total=len(first), unit="programs") as progress:
                    for key, future in futures.items():
                        outcomes[key] = future.result()
                        progress.advance()
        finally:
            for future in futures.values():
                future.cancel()
        for key, outcome in outcomes.items():
            if outcome.status == _DISTURBED:
                outcomes[key] = self._outcome(key, first[key])
        self.reused += len(programs) - len(first)
        return [outcomes[key] for key in keys]

    def key(self, program: Program) -> str:
        """SHA-256 of everything that a verdict depends on."""
        content = {
            "format": FORMAT,
            "language": program.language,
            "source": program.source,
            "support": program.support,
            "given": program.given,
            "tests": [[case.call, case.expected] for case in program.tests],
            "limits": [asdict(self.sandbox.limits), asdict(self.sandbox.compile_limits)],
            "isolation": asdict(self.sandbox.isolation),
            "toolchain": self.sandbox.toolchain(program.language),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _outcome(self, key: str, program: Program) -> Outcome:
        kept = self._known.get(key) or self._read(key)
        if kept is not None:
            with self._lock:
                self.reused += 1
                self._known[key] = kept
            return kept
        outcome = self.sandbox.judge(program)
        with self._lock:
            self.judged += 1
            if outcome.status not in _NOT_KEPT:
                self._known[key] = outcome
        if outcome.status not in _NOT_KEPT:
            self._write(key, outcome)
        return outcome

    def _read(self, key: str) -> Outcome | None:
        """The verdict in the folder, unless it is missing or unreadable."""
        if self._folder is None:
            return None
        try:
            values = parse_json((self._folder / f"{key}.json").read_text(encoding="utf-8"))
            return _outcome_of(values)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _write(self, key: str, outcome: Outcome) -> None:
        """Atomic but not synced: a verdict lost in a power cut is computed again."""
        if self._folder is None:
            return
        temporary = self._folder / f".{key}.{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
            temporary.replace(self._folder / f"{key}.json")
        except OSError as error:
            raise DataError(f"{self._folder}: cannot write a verdict: {error.strerror}; free space") from error


def _outcome_of(values: dict[str, Any]) -> Outcome:
    diagnostics = tuple(Diagnostic(**item) for item in values.pop("diagnostics"))
    return Outcome(diagnostics=diagnostics, results=tuple(values.pop("results")), **values)
