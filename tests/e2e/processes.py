"""The command line in a separate process, for tests that stop or kill it, or start several together.

What nobody disturbs runs here in this process: one that starts imports torch first, which takes seconds.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from nanochat_cli.cli.app import main

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


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread here and in processes that this one starts, as in those of `start`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")
            yield
    finally:
        torch.set_num_threads(before)


def run_here(folder: Path, *line: str) -> int:
    """The exit code of `nanochat LINE` in `folder`, in this process."""
    with contextlib.chdir(folder), one_thread():
        return main(list(line))
