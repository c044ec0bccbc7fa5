"""The Triton kernels in Triton's interpreter, on the CPU, against the reference.

Triton decides when it is imported whether kernels, its own library of functions included, are interpreted, and by the
time this file is collected something else may have imported it. So the tests are in `interpreted_*.py`, which pytest
does not collect by itself, and one child with TRITON_INTERPRET=1 runs them:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/interpreted_*.py
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[2]


@pytest.mark.timeout(280)
def test_every_interpreted_test_passes_in_a_child_process():
    files = sorted(str(path) for path in FOLDER.glob("interpreted_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout
