"""Runs assembled, trusted programs, many at once, for the tests of problems.

It has no limits and hides nothing from the programs, so it is not for generated code.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from nanochat_cli.sandbox.limits import Program

needs_rustc = pytest.mark.skipif(shutil.which("rustc") is None, reason="rustc is not installed: no Rust is compiled")

_PYTHON = """
import json, sys
answers = []
for source, tests in json.load(sys.stdin):
    results = []
    for call, expected in tests:
        names = {}
        try:
            exec(source, names)
            results.append(eval(call, names) == eval(expected, names))
        except Exception:
            results.append(False)
    answers.append(results)
print(json.dumps(answers))
"""


def run_python(programs: Sequence[Program]) -> list[list[bool]]:
    """For each program, which of its tests pass; all in one child process."""
    todo = [[f"{p.source}\n{p.support}", [[test.call, test.expected] for test in p.tests]] for p in programs]
    child = subprocess.run(
        [sys.executable, "-I", "-c", _PYTHON], input=json.dumps(todo), capture_output=True, text=True, check=True
    )
    return json.loads(child.stdout)


def run_rust(programs: Sequence[Program], folder: Path) -> list[list[bool]]:
    """For each program, which of its tests pass; all in one crate, which must compile."""
    calls = []
    for number, program in enumerate(programs):
        checks = "".join(
            f"    out.push(std::panic::catch_unwind(|| ({test.call}) == ({test.expected})).unwrap_or(false));\n"
            for test in program.tests
        )
        harness = f"pub fn run_tests() -> Vec<bool> {{\n    let mut out = Vec::new();\n{checks}    out\n}}\n"
        (folder / f"p{number}.rs").write_text(f"{program.source}\n{program.support}\n{harness}")
        calls.append(f'    println!("{{:?}}", p{number}::run_tests());\n')
    modules = "".join(f"mod p{number};\n" for number in range(len(programs)))
    quiet = "    std::panic::set_hook(Box::new(|_| {}));\n"
    (folder / "main.rs").write_text(f"{modules}fn main() {{\n{quiet}{''.join(calls)}}}\n")
    compiled = compile_rust(folder / "main.rs")
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    child = subprocess.run([folder / "main"], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in child.stdout.splitlines()]


def compile_rust(main: Path) -> subprocess.CompletedProcess[str]:
    """Compile main.rs and its modules next to it, without optimisation, warnings left out."""
    options = ["--edition=2021", "--cap-lints=allow", "--error-format=json", "-C", "debuginfo=0"]
    return subprocess.run(
        ["rustc", *options, "-o", str(main.with_suffix("")), str(main)], capture_output=True, text=True, check=False
    )


def files_with_errors(stderr: str) -> set[str]:
    """Names of the files in which rustc, with --error-format=json, reports an error."""
    messages = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    errors = [message for message in messages if message["level"] == "error"]
    return {Path(span["file_name"]).name for error in errors for span in error["spans"] if span["is_primary"]}
