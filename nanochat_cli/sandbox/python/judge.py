"""Python programs: compiled and run by the interpreter of this process, without its site packages.

With tests there are two sandboxes, joined by a socket: the program in one, the tests in the other.
"""

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_cli.sandbox.limits import MIB, Diagnostic, Limits, Outcome, ProgramLike
from nanochat_cli.sandbox.process import Command, Ended, Isolation, Running, drive, interpreter

_HERE = Path(__file__).parent
PROGRAM, GRADER, VALUES = (_HERE / f"{name}.py" for name in ("program_host", "grader", "plain_values"))
_MESSAGES = 4 * MIB
"""Most bytes that are read of a report."""


def compile_program(source: str, limits: Limits, isolation: Isolation) -> Outcome:
    """Compile only."""
    return _alone(source, "compile", limits, isolation)


def execute(source: str, limits: Limits, isolation: Isolation) -> Outcome:
    """Compile and run as `__main__`."""
    return _alone(source, "execute", limits, isolation)


def _alone(source: str, what: str, limits: Limits, isolation: Isolation) -> Outcome:
    received = bytearray()
    with (
        _folder(source) as folder,
        _pair() as (ours, theirs),
        Running(_program(folder, what, theirs, limits), isolation) as running,
    ):
        theirs.close()
        drive([running], running, (ours.fileno(), received, _MESSAGES))
        ended = running.end()
        outcome = _outcome(ended, running)
    said = _messages(received)
    if not said or not said[0].get("compiled"):
        return _not_compiled(outcome, said, ended)
    found = _diagnostics(said[0])
    if what == "compile":
        return replace(outcome, stage="compiled", diagnostics=found)
    return replace(outcome, stage="ran", diagnostics=(*found, *_fault(outcome)))


def judge(program: ProgramLike, limits: Limits, isolation: Isolation) -> Outcome:
    """Compile, run as a module, and count the tests that pass."""
    cases = [{"call": case.call, "expected": case.expected} for case in program.tests]
    received = bytearray()
    with (
        _folder(program.source) as folder,
        _pair() as (ours, theirs),
        _pair() as (program_end, grader_end),
        tempfile.TemporaryFile() as tests,  # has no name, so that no program can find it
    ):
        tests.write(json.dumps({"cases": cases, "support": program.support, "given": program.given}).encode())
        tests.seek(0)
        argv, visible = interpreter()
        grader = Command(
            [*argv, GRADER.name],
            replace(limits, wall=limits.wall + 1, memory=max(limits.memory, 256 * MIB)),
            files={GRADER.name: GRADER, VALUES.name: VALUES},
            channels=(grader_end.fileno(), theirs.fileno(), tests.fileno()),
            visible=visible,
        )
        with Running(grader, isolation) as judging:
            grader_end.close()
            theirs.close()
            with Running(_program(folder, "serve", program_end, limits), isolation) as running:
                program_end.close()
                drive([running, judging], judging, (ours.fileno(), received, _MESSAGES))
                if not running.ended:
                    running.stop()
                    drive([running], running)
                ended = running.end()
                outcome = _outcome(ended, running)
                graded = judging.end()
    judged = _judged(outcome, ended, _messages(received), len(cases))
    if judged.status in ("ok", "runtime error") and graded.status in ("killed", "timeout", "memory"):
        return replace(judged, status=graded.status)  # the grader's end says nothing of the program
    return judged


def _judged(outcome: Outcome, ended: Ended, said: list[dict[str, Any]], total: int) -> Outcome:
    """The outcome, from what the grader said: compiled, run, then one message for each test."""
    if not said or not said[0].get("compiled"):
        return replace(_not_compiled(outcome, said, ended), total=total, results=(False,) * total)
    found = list(_diagnostics(said[0]))
    status = outcome.status
    tests = said[2:] if said[1:] and said[1].get("run") else []
    results = [message.get("passed") is True for message in tests[:total]]
    found += [Diagnostic("failure", str(message.get("message"))) for message in tests if not message.get("passed")]
    if said[1:] and not said[1].get("run"):
        found.append(Diagnostic("error", str(said[1].get("message")), said[1].get("line")))
        status = "runtime error" if status == "ok" else status
    elif len(results) < total or any("the program ended before" in str(m.get("message")) for m in tests):
        status = "runtime error" if status == "ok" else status
    results += [False] * (total - len(results))
    return replace(
        outcome,
        stage="ran",
        status=_memory(status, found),
        diagnostics=tuple(found),
        passed=sum(results),
        total=total,
        results=tuple(results),
    )


def _memory(status: Any, found: list[Diagnostic]) -> Any:
    """A MemoryError that ended the run of the module is the limit's doing."""
    out = any(item.level == "error" and item.message.startswith("MemoryError") for item in found)
    return "memory" if status == "runtime error" and out else status


def _not_compiled(outcome: Outcome, said: list[dict[str, Any]], ended: Ended) -> Outcome:
    limited = ended.error is not None or ended.reason not in (None, "stopped")
    disturbed = not said and outcome.status == "killed"  # none of the program has run: it cannot be its own doing
    status = outcome.status if limited or disturbed else "compile error"
    found = _diagnostics(said[0]) if said else ()
    if not found:
        found = (Diagnostic("error", ended.error or f"the compiler ended without a word ({outcome.status})"),)
    return replace(outcome, stage="not compiled", status=status, diagnostics=found)


def _outcome(ended: Ended, running: Running) -> Outcome:
    """How the process ended, in the words of an outcome that knows nothing of tests yet."""
    stderr = running.tail("stderr")
    status = "ok" if ended.reason == "stopped" else ended.status
    if status == "runtime error" and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    found = (Diagnostic("error", f"the sandbox: {ended.error}"),) if ended.error else ()
    return Outcome("ran", status, found, stdout=running.tail("stdout"), stderr=stderr, seconds=ended.seconds)


def _fault(outcome: Outcome) -> tuple[Diagnostic, ...]:
    if outcome.status in ("ok", "timeout", "output limit") or not outcome.stderr.strip():
        return ()
    return (Diagnostic("error", outcome.stderr.strip().rpartition("\n")[2]),)


def _program(folder: Path, what: str, channel: socket.socket, limits: Limits) -> Command:
    argv, visible = interpreter()
    files = {PROGRAM.name: PROGRAM, VALUES.name: VALUES, "program.py": folder / "program.py"}
    return Command([*argv, PROGRAM.name, what], limits, files=files, channels=(channel.fileno(),), visible=visible)


def _messages(received: bytearray) -> list[dict[str, Any]]:
    """Whole lines of JSON objects; what comes behind a line that is none is left out."""
    found = []
    for line in bytes(received).split(b"\n")[:-1]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(message, dict):
            break
        found.append(message)
    return found


def _diagnostics(said: dict[str, Any]) -> tuple[Diagnostic, ...]:
    return tuple(Diagnostic(level, message, line) for level, message, line in said.get("diagnostics", []))


@contextmanager
def _folder(source: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as name:
        folder = Path(name)
        (folder / "program.py").write_bytes(source.encode("utf-8", errors="surrogatepass"))
        yield folder


@contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with closing(one), closing(other):
        yield one, other
