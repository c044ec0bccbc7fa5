"""`benchmarks/gpu.py` on a machine without CUDA: it says so, and its checks are checks."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nanochat_cli.errors import ValidationFailure

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_cuda_it_ends_with_one_line_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", out],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: benchmarks/gpu.py needs a CUDA device")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not out.exists()


def test_a_device_that_computes_what_the_cpu_does_passes_every_check(gpu: ModuleType) -> None:
    results = gpu.check_kernels(torch.device("cpu"))
    assert len(results) == 5 + 3 * 5
    assert all(result.value == 1.0 for result in results)


def test_one_differing_code_fails_and_is_named(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = gpu.unpack_plane128

    def wrong(packed: torch.Tensor, columns: int) -> torch.Tensor:
        codes = unpack(packed, columns)
        codes[-1, -1] = 1 - codes[-1, -1].abs()
        return codes

    monkeypatch.setattr(gpu, "unpack_plane128", wrong)
    with pytest.raises(ValidationFailure, match=r"unpack_plane128: 1 of 524288 values on cpu are not the CPU's"):
        gpu.check_kernels(torch.device("cpu"))
