"""Rust programs: rustc with JSON diagnostics, then the binary; both in the sandbox.

The program's crate makes the calls of the tests and sends the `Debug` text of each value to the host. A second crate
without the program computes the expected values, and the host compares. So a program that replaces types, macros or
`main`, or reads its own sources, still has to compute the answers. Needs rustc and a C linker.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from nanochat_cli.errors import ConfigError
from nanochat_cli.nesting import parse_json
from nanochat_cli.sandbox.limits import MIB, Diagnostic, Limits, Outcome, Program
from nanochat_cli.sandbox.process import Command, Isolation, Running, drive, run
from nanochat_cli.sandbox.rust.cases import Check, canonical, checks_of, crate_of, expected_crate, reports
from nanochat_cli.sandbox.rust.plain import Guard

_FLAGS = ["--edition", "2021", "--error-format=json", "-A", "dead_code", "-C", "codegen-units=1", "-C", "debuginfo=0"]
_OWN_ROOT = re.compile(r"\bfn\s+main\s*\(|^\s*#!\[", re.MULTILINE)


@lru_cache(maxsize=1)
def toolchain() -> tuple[str, str]:
    """Paths of rustc itself (not of rustup's proxy) and of its toolchain. Raises ConfigError without rustc."""
    rustc = shutil.which("rustc")
    if rustc is None:
        raise ConfigError("rustc was not found; install Rust (https://rustup.rs) to judge Rust programs")
    answer = subprocess.run([rustc, "--print", "sysroot"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        reason = answer.stderr.strip().rpartition("\n")[2]
        raise ConfigError(f"{rustc} does not work: {reason}; repair the installation")
    root = os.path.realpath(answer.stdout.strip())
    return f"{root}/bin/rustc", root


@lru_cache(maxsize=1)
def version() -> str:
    """The answer of `rustc --version`. Raises ConfigError without rustc."""
    return subprocess.run([toolchain()[0], "--version"], capture_output=True, text=True, check=True).stdout.strip()


def compile_program(source: str, limits: Limits, isolation: Isolation) -> Outcome:
    """Check the program as a library; generates no machine code and runs nothing.

    Compiles as far as MIR, since the lints against certain overflows and panics come after the metadata.
    """
    return _rustc(source, ["--crate-type", "lib", "--emit=mir"], None, limits, isolation)


def execute(source: str, limits: Limits, compile_limits: Limits, isolation: Isolation) -> Outcome:
    """Compile and run `main`."""
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as name:
        binary = Path(name) / "main"
        compiled = _rustc(source, [], binary, compile_limits, isolation)
        if compiled.status != "ok":
            return compiled
        outcome, _ = _run(binary, limits, isolation)
    return replace(
        outcome,
        diagnostics=(*compiled.diagnostics, *outcome.diagnostics, *_fault(outcome)),
        seconds=compiled.seconds + outcome.seconds,
    )


def judge(program: Program, limits: Limits, compile_limits: Limits, isolation: Isolation) -> Outcome:
    """Compile the program with the calls of its tests, run them, compare with the expected values."""
    total = len(program.tests)
    tests = tuple((case.call, case.expected) for case in program.tests)
    plain = [Check(number, call, expected) for number, (call, expected) in enumerate(tests)]
    checks, support = checks_of(tests, program.support, program.source), ""
    failed: dict[str, Any] = {"total": total, "results": (False,) * total}
    try:
        values = _expected(expected_crate(checks), compile_limits, isolation) if checks else None
        if checks is None or values is None:
            checks, support = plain, program.support
            values = _expected(expected_crate(checks), compile_limits, isolation)
    except _Undecided as undecided:
        return replace(undecided.outcome, stage="not compiled", **failed)
    if values is None:
        outcome = compile_program(program.source, compile_limits, isolation)
        reason = Diagnostic("error", "an expected value does not compile by itself")
        status = "tests do not compile" if outcome.compiled else outcome.status
        return replace(outcome, status=status, diagnostics=(*outcome.diagnostics, reason), **failed)
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as name:
        binary = Path(name) / "main"
        inside = bool(_OWN_ROOT.search(program.source))
        guard = Guard(program.source, support, program.given)
        crate = crate_of(program.source, support, checks, inside, guard)
        compiled = _rustc(crate, [], binary, compile_limits, isolation)
        if compiled.status != "ok":
            return replace(_blame(program.source, compiled, compile_limits, isolation), **failed)
        outcome, reported = _run(binary, limits, isolation)
    passed, failures = _compare(checks, values, reported, total)
    last = program.source.count("\n") + 1
    warnings = [
        replace(item, line=item.line - inside)
        for item in compiled.diagnostics
        if item.line is not None and 1 <= item.line - inside <= last
    ]
    return replace(
        outcome,
        diagnostics=(*warnings, *outcome.diagnostics, *failures, *_fault(outcome)),
        passed=sum(passed),
        total=total,
        results=tuple(passed),
        seconds=compiled.seconds + outcome.seconds,
    )


def _blame(source: str, together: Outcome, limits: Limits, isolation: Isolation) -> Outcome:
    """Tell whether the program or its tests are at fault when both do not compile together."""
    alone = compile_program(source, limits, isolation)
    if not alone.compiled:
        return alone
    status = "tests do not compile" if together.status == "compile error" else together.status
    return replace(together, stage="compiled", status=status)


def _compare(
    checks: Sequence[Check], values: Sequence[str], reported: dict[int, str | None], total: int
) -> tuple[list[bool], list[Diagnostic]]:
    """Which tests passed, since each of their checks has the expected value, and the failures of the others."""
    passed, failures = [True] * total, []
    for number, (check, value) in enumerate(zip(checks, values, strict=True)):
        answer = reported.get(number, "")
        if answer is not None and number in reported and canonical(answer) == canonical(value):
            continue
        passed[check.case] = False
        reason = "panics" if answer is None else f"is {answer}, not {value}" if number in reported else "did not end"
        failures.append(Diagnostic("failure", f"{check.call} {reason}"[:1000]))
    return passed, failures


class _Undecided(Exception):
    """Computing the expected values was killed or timed out, so that there is no verdict to keep."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.status)
        self.outcome = outcome


@lru_cache(maxsize=4096)
def _expected(crate: str, limits: Limits, isolation: Isolation) -> tuple[str, ...] | None:
    """The `Debug` texts of expected values; None if they need the program. Raises _Undecided."""
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as name:
        binary = Path(name) / "main"
        compiled = _rustc(crate, [], binary, limits, isolation)
        if compiled.status in ("killed", "timeout"):
            raise _Undecided(compiled)
        if compiled.status != "ok":
            return None
        outcome, reported = _run(binary, replace(limits, wall=10, cpu=10), isolation)
    if outcome.status in ("killed", "timeout"):
        raise _Undecided(outcome)
    values = [reported[number] for number in sorted(reported)]
    if outcome.status != "ok" or None in values:
        return None
    return tuple(str(value) for value in values)


def _rustc(source: str, flags: Sequence[str], binary: Path | None, limits: Limits, isolation: Isolation) -> Outcome:
    rustc, root = toolchain()
    with tempfile.TemporaryDirectory(prefix="nanochat-sandbox-") as name:
        file = Path(name) / "program.rs"
        file.write_bytes(source.encode("utf-8", errors="surrogatepass"))
        command = Command(
            [rustc, "--sysroot", root, "--crate-name", "program", *_FLAGS, *flags, "-o", "main", "program.rs"],
            limits,
            files={"program.rs": file},
            visible=[root],
            output=None if binary is None else ("main", binary),
            tail=MIB,
        )
        ended, _, errors = run(command, isolation)
    diagnostics = tuple(_diagnostics(errors))
    if ended.status == "ok":
        return Outcome("compiled", "ok", diagnostics, seconds=ended.seconds)
    status = "compile error" if ended.status == "runtime error" else ended.status
    if status == "compile error" and re.search(
        r"memory allocation of \d+ bytes failed|LLVM ERROR: out of memory", errors
    ):
        status = "memory"
    if not any(item.level == "error" for item in diagnostics):
        message = errors.strip().rpartition("\n")[2] or "rustc ended without a message"
        diagnostics = (*diagnostics, Diagnostic("error", f"{status}: {ended.error or message[:500]}"))
    return Outcome("not compiled", status, diagnostics, seconds=ended.seconds)


def _diagnostics(errors: str) -> list[Diagnostic]:
    """rustc's JSON lines (https://doc.rust-lang.org/rustc/json.html) without its closing summary."""
    diagnostics = []
    for line in errors.splitlines():
        try:
            if (found := _diagnostic(parse_json(line))) is not None:
                diagnostics.append(found)
        except (ValueError, KeyError, TypeError, AttributeError):  # not one of rustc's
            continue
    return diagnostics


def _diagnostic(item: Any) -> Diagnostic | None:
    """Raises KeyError, TypeError or AttributeError for JSON of another form."""
    if item.get("$message_type", "diagnostic") != "diagnostic":
        return None
    spans = [span for span in item.get("spans", []) if span.get("is_primary")]
    code = item.get("code")
    if not spans and not code and (item["level"] != "error" or item["message"].startswith("aborting due to")):
        return None
    label = f"{code['code']}: " if code else ""
    return Diagnostic(item["level"], f"{label}{item['message']}"[:1000], spans[0]["line_start"] if spans else None)


def _run(binary: Path, limits: Limits, isolation: Isolation) -> tuple[Outcome, dict[int, str | None]]:
    """Run a compiled crate. Returns its outcome and the value that it reported for each check (None: it panicked)."""
    received = bytearray()
    reader, writer = os.pipe()
    try:
        command = Command(["./main"], limits, files={"main": binary}, channels=(writer,))
        with Running(command, isolation) as running:
            os.close(writer)
            writer = -1
            drive([running], running, (reader, received, 4 * MIB))
            ended = running.end()
            stdout, stderr = running.tail("stdout"), running.tail("stderr")
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    status = ended.status
    if status == "runtime error" and re.search(r"^memory allocation of \d+ bytes failed", stderr, re.MULTILINE):
        status = "memory"
    errors = (Diagnostic("error", f"the sandbox: {ended.error}"),) if ended.error else ()
    return Outcome("ran", status, errors, stdout=stdout, stderr=stderr, seconds=ended.seconds), reports(bytes(received))


def _fault(outcome: Outcome) -> tuple[Diagnostic, ...]:
    lines = outcome.stderr.strip().splitlines()
    if outcome.status == "ok" or not lines:
        return ()
    return (Diagnostic("error", next((line for line in lines if "panicked at" in line), lines[-1])[:1000]),)
