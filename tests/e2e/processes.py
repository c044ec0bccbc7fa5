"""The command line in a process of its own, for tests that stop or kill it."""

import os
import subprocess
import sys
from pathlib import Path


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
