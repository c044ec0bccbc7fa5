"""Python programs: compiled and run by the interpreter of this process, without site packages.

Tests need two sandboxes, joined by a socket: the program runs in one, the tests in the other.
"""

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanochat_cli.sandbox.limits import MIB, Diagnostic, Limits, Outcome, Program
from nanochat_cli.sandbox.process import Command, Ended, Isolation, Running, drive, interpreter

_HERE = Path(__file__).parent
PROGRAM, GRADER, VALUES = (_HERE / f"{name}.py" for name in ("program_host", "grader", "plain_values"))
_MOST_BYTES = 4 * MIB
"""The part of a report that is read."""


def compile_program(source: str, limits: Limits, isolation: Isolation) -> Outcome:
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
        drive([running], running, (ours.fileno(), received, _MOST_BYTES))
        ended = running.end()
        outcome = _outcome(ended, running)
    messages = _messages(received)
    if not messages or not messages[0].get("compiled"):
        return _not_compiled(outcome, messages, ended)
    diagnostics = _diagnostics(messages[0])
    if what == "compile":
        return replace(outcome, stage="compiled", diagnostics=diagnostics)
    return replace(outcome, stage="ran", diagnostics=(*diagnostics, *_fault(outcome)))


def judge(program: Program, limits: Limits, isolation: Isolation) -> Outcome:
    """Compile, run as a module, and count the tests that pass."""
    cases = [{"call": case.call, "expected": case.expected} for case in program.tests]
    received = bytearray()
    with (
        _folder(program.source) as folder,
        _pair() as (ours, theirs),
        _pair() as (program_end, grader_end),
        tempfile.TemporaryFile() as tests,  # unlinked, so that no program can find it
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
                drive([running, judging], judging, (ours.fileno(), received, _MOST_BYTES))
                if not running.ended:
                    running.stop()
                    drive([running], running)
                ended = running.end()
                outcome = _outcome(ended, running)
                graded = judging.end()
    judged = _judged(outcome, ended, _messages(received), len(cases))
    if judged.status in ("ok", "runtime error") and graded.status in ("killed", "timeout", "memory"):
        return replace(judged, status=graded.status)  # no verdict about the program
    return judged


def _judged(outcome: Outcome, ended: Ended, messages: list[dict[str, Any]], total: int) -> Outcome:
    """The outcome from the grader's messages: whether it compiled, whether it ran, then one for each test."""
    if not messages or not messages[0].get("compiled"):
        return replace(_not_compiled(outcome, messages, ended), total=total, results=(False,) * total)
    diagnostics = list(_diagnostics(messages[0]))
    status = outcome.status
    run = messages[1] if len(messages) > 1 else None
    tests = messages[2:] if run and run.get("run") else []
    results = [test.get("passed") is True for test in tests[:total]]
    diagnostics += [Diagnostic("failure", str(test.get("message"))) for test in tests if not test.get("passed")]
    if run is not None and not run.get("run"):
        diagnostics.append(Diagnostic("error", str(run.get("message")), run.get("line")))
        status = "runtime error" if status == "ok" else status
    elif len(results) < total or any("the program ended before" in str(test.get("message")) for test in tests):
        status = "runtime error" if status == "ok" else status
    results += [False] * (total - len(results))
    return replace(
        outcome,
        stage="ran",
        status=_memory(status, diagnostics),
        diagnostics=tuple(diagnostics),
        passed=sum(results),
        total=total,
        results=tuple(results),
    )


def _memory(status: Any, diagnostics: list[Diagnostic]) -> Any:
    """A MemoryError while the module runs means that it reached the limit."""
    out = any(item.level == "error" and item.message.startswith("MemoryError") for item in diagnostics)
    return "memory" if status == "runtime error" and out else status


def _not_compiled(outcome: Outcome, messages: list[dict[str, Any]], ended: Ended) -> Outcome:
    limited = ended.error is not None or ended.reason not in (None, "stopped")
    disturbed = not messages and outcome.status == "killed"  # before the program ran, so from outside
    status = outcome.status if limited or disturbed else "compile error"
    diagnostics = _diagnostics(messages[0]) if messages else ()
    if not diagnostics:
        diagnostics = (Diagnostic("error", ended.error or f"the compiler ended without a message ({outcome.status})"),)
    return replace(outcome, stage="not compiled", status=status, diagnostics=diagnostics)


def _outcome(ended: Ended, running: Running) -> Outcome:
    """The outcome of the process before tests are counted."""
    stderr = running.tail("stderr")
    status = "ok" if ended.reason == "stopped" else ended.status
    if status == "runtime error" and stderr.rstrip().rpartition("\n")[2].startswith("MemoryError"):
        status = "memory"
    errors = (Diagnostic("error", f"the sandbox: {ended.error}"),) if ended.error else ()
    return Outcome("ran", status, errors, stdout=running.tail("stdout"), stderr=stderr, seconds=ended.seconds)


def _fault(outcome: Outcome) -> tuple[Diagnostic, ...]:
    if outcome.status in ("ok", "timeout", "output limit") or not outcome.stderr.strip():
        return ()
    return (Diagnostic("error", outcome.stderr.strip().rpartition("\n")[2]),)


def _program(folder: Path, what: str, channel: socket.socket, limits: Limits) -> Command:
    argv, visible = interpreter()
    files = {PROGRAM.name: PROGRAM, VALUES.name: VALUES, "program.py": folder / "program.py"}
    return Command([*argv, PROGRAM.name, what], limits, files=files, channels=(channel.fileno(),), visible=visible)


def _messages(received: bytearray) -> list[dict[str, Any]]:
    """The JSON objects of whole lines, up to the first line that is not one."""
    messages = []
    for line in bytes(received).split(b"\n")[:-1]:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(message, dict):
            break
        messages.append(message)
    return messages


def _diagnostics(report: dict[str, Any]) -> tuple[Diagnostic, ...]:
    found = report.get("diagnostics")
    items = (item for item in (found if isinstance(found, list) else ()) if isinstance(item, list) and len(item) == 3)
    return tuple(Diagnostic(str(level), str(message), line) for level, message, line in items)


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
