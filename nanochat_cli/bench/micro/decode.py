"""Tokens per second of a whole packed model against llama.cpp on the same GGUF file.

Both sides are separate processes (`decode_contender`) that take turns; each is stopped while the other runs. Knows how
to run and compare them; choosing the file and writing results is left to `run_decode`.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from nanochat_cli.errors import NanochatError
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result, summarise

CONTENDERS = ("nanochat", "llama.cpp")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_DYNAMIC", "OMP_PROC_BIND", "OMP_PLACES")
METRICS = ("prefill", "decode")
TIMEOUT = 900.0
"""Seconds to wait for an answer, loading included."""


@dataclass(frozen=True)
class Job:
    """The work for both sides. prompt: token ids."""

    gguf: Path
    threads: int
    prompt: Sequence[int]
    new_tokens: int


class Contender:
    """A child process that measures itself and is stopped between its turns. A context manager."""

    def __init__(self, name: str, job: Job, warn: Callable[[str], None]) -> None:
        self.name, self._warn = name, warn
        self._folder = tempfile.TemporaryDirectory(prefix="nanochat-decode-")
        request = Path(self._folder.name, "request.json")
        fields = {"contender": name, "gguf": str(job.gguf.resolve()), "threads": job.threads}
        request.write_text(
            json.dumps({**fields, "prompt": list(job.prompt), "new_tokens": job.new_tokens}), encoding="utf-8"
        )
        self._log = Path(self._folder.name, "log")
        # How threads wait decides how fast they are; both sides get their libraries' own choice.
        inherited = {name: value for name, value in os.environ.items() if name not in WAITING}
        with self._log.open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "nanochat_cli.bench.micro.decode_contender", str(request)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**inherited, "OMP_NUM_THREADS": str(job.threads)},
            )

    def __enter__(self) -> Self:
        try:
            self._wait_for("READY")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self._child.send_signal(signal.SIGSTOP)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()  # also ends a process that is stopped
        self._child.communicate()
        self._folder.cleanup()

    def measure(self) -> dict[str, float]:
        """Prefill and decode rate of one turn, in tokens per second. NanochatError if the process fails."""
        assert self._child.stdin is not None
        self._child.send_signal(signal.SIGCONT)
        try:
            self._child.stdin.write(b"go\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        rates = json.loads(self._wait_for("RATES"))
        self._child.send_signal(signal.SIGSTOP)
        return rates

    def _wait_for(self, word: str) -> str:
        """The rest of the next line that begins with `word`; warnings before it are passed on."""
        assert self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            while selector.select(TIMEOUT):
                line = self._child.stdout.readline().decode(errors="replace")
                if not line:
                    raise self._failure()
                first, _, rest = line.strip().partition(" ")
                if first == word:
                    return rest
                if first == "WARNING":
                    self._warn(f"{self.name}: {rest}")
        raise NanochatError(f"{self.name} did not answer within {TIMEOUT:g} s")

    def _failure(self) -> NanochatError:
        self._child.wait()
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "error" in line.lower()] or lines
        why = telling[-1] if telling else "no output"
        return NanochatError(f"{self.name} ended with exit code {self._child.returncode}: {why}")


def measure(job: Job, case: str, rounds: int, reporter: Reporter) -> list[Result]:
    """Both sides in turn, after a warm-up round; the ratio is ours to llama.cpp's, pair by pair. Needs xllamacpp."""
    rates: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    steps = len(CONTENDERS) * (rounds + 2)
    with ExitStack() as stack, reporter.progress("prefill and decode in turn", steps, "runs") as progress:
        contenders: list[Contender] = []
        for name in CONTENDERS:
            contenders.append(stack.enter_context(Contender(name, job, reporter.warn)))
            progress.advance()
        for turn in range(-1, rounds):
            for contender in contenders:
                measured = contender.measure()
                if turn >= 0:
                    rates[contender.name].append(measured)
                progress.advance()
    tokens = {"prefill": len(job.prompt), "decode": job.new_tokens}
    results: list[Result] = []
    for metric in METRICS:
        ours, theirs = ([rate[metric] for rate in rates[name]] for name in CONTENDERS)
        what = f"{case}, {metric} of {tokens[metric]} tokens"
        results.append(summarise(what, "rate", "tokens/s", ours, peer="llama.cpp", peer_runs=theirs))
        results.append(summarise(f"{what}: llama.cpp", "rate", "tokens/s", theirs))
    return results
