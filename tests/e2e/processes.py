"""The command line in a separate process, for tests that stop or kill it, or start several together."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *line: str) -> "subprocess.Popen[str]":
    """`nanochat LINE` in `folder`; one thread, so that sums have one order."""
    return subprocess.Popen(
        [sys.executable, "-m", "nanochat_cli.cli.app", *line],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_together(folder: Path, *lines: Sequence[str]) -> list[tuple[int, str]]:
    """Run all lines at the same moment, each in its own process; returns exit codes and standard errors in order."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.waiting_command", *line],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for line in lines
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]
