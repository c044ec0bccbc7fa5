"""`benchmarks/gpu.py` on a machine without CUDA: it says so, its checks can fail, and a failure does not end it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_kernels import check_triton, measure_table
from nanochat_cli.bench.micro.kernels import Product
from nanochat_cli.bench.micro.kernels_cpu import CPU
from nanochat_cli.config.load import resolve_config
from nanochat_cli.diagnose.validate.matmul_case import Case
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.result_file import Result

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


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


def test_a_device_that_computes_what_the_cpu_does_passes_every_check() -> None:
    results = gpu.check_kernels(torch.device("cpu"))
    assert len(results) == 5 + 3 * 5
    assert all(result.value == 1.0 for result in results)


def test_one_differing_code_fails_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = gpu.unpack_plane128

    def wrong(packed: torch.Tensor, columns: int) -> torch.Tensor:
        codes = unpack(packed, columns)
        codes[-1, -1] = 1 - codes[-1, -1].abs()
        return codes

    monkeypatch.setattr(gpu, "unpack_plane128", wrong)
    with pytest.raises(ValidationFailure, match=r"unpack_plane128: 1 of 524288 values on cpu differ from the CPU"):
        gpu.check_kernels(torch.device("cpu"))


def parts(*outcomes: list[Result] | Exception) -> dict[str, Callable[[float], gpu.Findings]]:
    def run(outcome: list[Result] | Exception) -> gpu.Findings:
        if isinstance(outcome, Exception):
            raise outcome
        return gpu.Findings(outcome)

    return {f"part {i}": lambda _, outcome=outcome: run(outcome) for i, outcome in enumerate(outcomes)}


def test_a_section_that_fails_is_written_down_and_the_others_still_run(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    first, last = Result("a", "m", 1.0, "s"), Result("b", "m", 2.0, "s")
    failures = gpu.run_sections(parts([first], ValidationFailure("differs"), MemoryError("full"), [last]), out)
    assert failures == ["part 1: differs", "part 2: MemoryError: full"]
    found = json.loads(out.read_text())
    assert [result["case"] for result in found["results"]] == ["a", "b"]
    assert found["failures"] == failures
    assert list(found["seconds"]) == ["part 0", "part 1", "part 2", "part 3"]


def test_later_sections_know_how_much_time_is_left(tmp_path: Path) -> None:
    left: list[float] = []

    def run(seconds: float) -> gpu.Findings:
        left.append(seconds)
        return gpu.Findings(details={f"extra {len(left)}": 1})

    gpu.run_sections({"a": run, "b": run}, tmp_path / "gpu.json")
    assert gpu.TOTAL_SECONDS >= left[0] > left[1] > 0
    assert {"extra 1", "extra 2"} <= json.loads((tmp_path / "gpu.json").read_text()).keys()


def test_the_sections_are_those_of_the_documentation() -> None:
    wanted = gpu.sections(torch.device("cpu"), QuietReporter(), 1, 1, 1)
    assert gpu.__doc__ is not None
    assert all(f"`{name}`" in gpu.__doc__ for name in wanted)
    assert list(wanted)[-1] == "sweep", "it takes what time is left"


def test_training_runs_in_its_sections_on_any_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["model.dim=128", "model.n_heads=2", "model.n_kv_heads=1", "model.ffn_dim=128", "model.n_layers=1"]
    small += ["model.vocab_size=300", "train.batch_size=1", "train.seq_len=8"]
    tiny = resolve_config(["quickstart"], overrides=small)
    monkeypatch.setattr(gpu, "resolve_config", lambda _: tiny)
    monkeypatch.setattr(gpu, "billion", lambda config: config)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    wanted = gpu.sections(torch.device("cpu"), QuietReporter(), 1, 1, 2)
    chosen = {name: wanted[name] for name in ("training", "losses", "training-1b")}
    assert gpu.run_sections(chosen, tmp_path / "gpu.json") == []
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"training rate"} < {result["metric"] for result in found["results"]}
    assert all(len(curve) == 2 for curve in found["losses"].values())


def test_the_operations_are_compared_with_the_reference() -> None:
    (result,) = check_triton([Case(17, 128, 1)], QuietReporter(), "cpu")
    assert result.value > 10


def test_the_table_names_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with small products instead of the large ones."""
    from benchmarks import gpu_kernels

    fast, wide = Product(128, 256, 1), Product(256, 256, 1)
    monkeypatch.setattr(gpu_kernels, "TARGETS", {fast: 0.0})
    monkeypatch.setattr(gpu_kernels, "BANDWIDTH_TARGET", (wide, 1e9))
    monkeypatch.setattr("nanochat_cli.bench.micro.kernels_cpu.MIN_ROTATION_BYTES", 1)
    monkeypatch.setattr("nanochat_cli.bench.micro.kernels_cpu.last_level_cache_bytes", lambda: 1)
    results, claims = measure_table(CPU(), QuietReporter(), [fast, wide], rounds=1)
    assert {result.peer for result in results} == {None, "F.linear bf16", "F.linear fp32"}
    assert [(claim.id, claim.verdict) for claim in claims] == [
        ("gpu-128x256-m1", "supported"),
        ("gpu-bandwidth", "not supported"),
    ]


SWEEP = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from benchmarks.gpu_kernels import sweep
from nanochat_cli.bench.micro.kernels import Product
from nanochat_cli.report.reporter import PlainReporter

class Interpreter:
    name, torch_device, backend, rotation_bytes = "interpreter", torch.device("cpu"), "triton", 1
    def prepare(self, calls):
        return lambda: calls[0]().sum().item() * 0 + 1e-3

for result in sweep(Interpreter(), PlainReporter(), SECONDS, [Product(8, 256, M) for M in (1, 16, 65)]):
    print("RESULT", result.case, "|", result.metric, "|", result.ratio)
"""


def test_the_sweep_compares_configurations_and_stops_when_its_time_is_over() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SWEEP.replace("SECONDS", "6.0")], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    for tokens in (1, 16, 65):
        ours = [line for line in lines if f"M {tokens}," in line]
        assert " | committed | None" in ours[0]
        assert all(line.endswith("| 1.0") for line in ours[1:])
    assert "computes a wrong result" not in done.stderr
    assert "Configuration(" in done.stdout
