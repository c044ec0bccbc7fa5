"""`nanochat bench kernels` in a tiny form: what it compares, what it writes, and what it refuses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from nanochat_cli.bench.micro import kernels_cpu, run_kernels
from nanochat_cli.bench.micro.kernels import FULL, KernelMeasurements, Point, Product, measure, packed_copies
from nanochat_cli.bench.micro.kernels_cpu import CPU, threads
from nanochat_cli.bench.micro.roofline import plot_roofline, roofline_figure
from nanochat_cli.cli.app import main
from nanochat_cli.errors import ConfigError
from nanochat_cli.report.reporter import QuietReporter
from nanochat_kernels.backends import Unsupported

TINY = [Product(128, 256, 1), Product(64, 128, 3, 128)]


class Clock:
    """A device where every contender takes a known time: ours 2 s, bf16 8 s, fp32 16 s; memory reads 100 B/s."""

    name, backend, memory_roof = "clock", "cpu", "read rate"
    torch_device, activation_dtype, rotation_bytes = torch.device("cpu"), torch.float32, 10_000

    def __init__(self) -> None:
        self.prepared: list[Sequence[Callable[[], torch.Tensor]]] = []
        self.turns: list[int] = []

    def prepare(self, calls):
        self.prepared.append(calls)
        index = len(self.prepared) - 1

        def run() -> float:
            self.turns.append(index)
            return (2.0, 8.0, 16.0)[index % 3]

        return run

    def bytes_per_second(self) -> float:
        return 100.0

    def peak(self) -> tuple[str, float]:
        return "some matmul", 1e6


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_kernels, "QUICK", TINY)
    monkeypatch.setattr(kernels_cpu, "MIN_ROTATION_BYTES", 100_000)
    monkeypatch.setattr(kernels_cpu, "READ_BYTES", 2**20)
    monkeypatch.setattr(kernels_cpu, "PEAK_SIZE", 64)
    monkeypatch.setattr(kernels_cpu, "last_level_cache_bytes", lambda: 1)


def test_ratios_are_the_peers_times_over_ours_and_shares_are_of_the_memory_roof() -> None:
    found = measure([Product(128, 256, 1)], Clock(), QuietReporter(), rounds=5)
    ratios = {result.peer: result.ratio for result in found.results if result.peer}
    assert ratios == {"F.linear bf16": 4.0, "F.linear fp32": 8.0}
    (share,) = [result for result in found.results if result.unit == "share"]
    assert share.value == pytest.approx((128 * 256 / 4 + 128 * 4) / 2.0 / 100.0)
    assert found.roof == 100.0
    assert all(len(result.runs) == 5 for result in found.results if result.case.startswith("GEMV"))


def test_contenders_take_turns() -> None:
    clock = Clock()
    measure([Product(128, 256, 1)], clock, QuietReporter(), rounds=3)
    assert clock.turns == [0, 1, 2] * 3


def test_all_contenders_compute_the_same_product_on_enough_copies() -> None:
    """Sums of 256 products of independent noise, which int8 activations and ternary weights change only in part."""
    clock = Clock()
    product = Product(128, 256, 2)
    measure([product], clock, QuietReporter(), rounds=1)
    ours, bf16, fp32 = clock.prepared
    assert len(ours) * packed_copies(product, clock)[0].bytes >= clock.rotation_bytes
    assert len(fp32) == len(bf16) == 2
    assert ours[0]().shape == bf16[0]().shape == fp32[0]().shape == (2, 128)
    assert torch.allclose(bf16[0]().float(), fp32[0](), rtol=0.1, atol=0.5)
    assert torch.equal(ours[0](), ours[-1]())


def test_the_point_counts_every_byte_once() -> None:
    found = measure([Product(128, 256, 3)], Clock(), QuietReporter(), rounds=1)
    (point,) = found.points
    assert point.bytes == 128 * 256 // 4 + 128 * 4 + 3 * 256 * 4 + 3 * 128 * 4
    assert point.rate == 2 * 128 * 256 * 3 / 2.0
    assert point.intensity == pytest.approx(2 * 128 * 256 * 3 / point.bytes)


def test_the_full_form_has_the_shapes_that_were_promised() -> None:
    shapes = {(768, 768), (2048, 768), (4096, 4096), (11008, 4096)}
    assert {(p.rows, p.columns, p.tokens) for p in FULL} == {(*s, m) for s in shapes for m in (1, 16, 512)}


def test_the_rotation_is_beyond_the_last_level_cache() -> None:
    assert CPU().rotation_bytes >= max(100_000_000, 4 * kernels_cpu.last_level_cache_bytes())
    assert kernels_cpu.last_level_cache_bytes() >= 2**15


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.usefixtures("_small")
def test_the_command_writes_its_results_and_the_roofline(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, whole = tmp_path / "new" / "kernels.json", tmp_path / "result.json"
    line = ["bench", "kernels", "--quick", "--device", "cpu", "--threads", "1", "--out", str(out), "--json", str(whole)]
    assert main(line) == 0
    found = json.loads(out.read_text())
    assert found["suite"] == "kernels"
    assert found["threads"] == 1
    assert {result["peer"] for result in found["results"]} == {None, "F.linear bf16", "F.linear fp32"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(whole.read_text())["results"] == found["results"]
    shown = capfd.readouterr().out
    assert "GEMV 128×256, M 1" in shown
    assert "GEMM 64×128, M 3, scale 128" in shown


@pytest.mark.usefixtures("_small")
def test_the_hidden_alias_is_the_same_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "kernels", "--quick", "--device", "cpu", "--threads", "1"]) == 0
    assert "GEMV 128×256, M 1" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "--device tpu does not exist: choose one of cpu, cuda"),
        (["--out", "here.txt"], "--out here.txt: must end in .json; the roofline becomes here.png"),
    ],
)
def test_mistakes_are_one_line(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["bench", "kernels", *arguments]) == 2
    assert capfd.readouterr().err == f"error: {message}\n"


def test_without_compiled_kernels_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise Unsupported("no C compiler")

    monkeypatch.setattr(kernels_cpu, "library", missing)
    with pytest.raises(ConfigError, match="cannot be measured here: no C compiler"):
        CPU()


def test_the_roofline_shows_every_product_below_a_sloped_roof() -> None:
    points = [Point(Product(128, 256, 1), 1e-6, 10_000), Point(Product(512, 512, 16), 1e-4, 80_000)]
    found = KernelMeasurements("a machine", "read rate", 25e9, "some matmul", 1e11, points=points)
    (axes,) = roofline_figure(found).axes
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"M = 1", "M = 16"}
    x, y = axes.lines[0].get_data()
    assert y[0] / x[0] == pytest.approx(25e9)
    assert y[-1] / x[-1] == pytest.approx(25e9)
    labels = {text.get_text() for text in axes.texts}
    assert {"128×256", "512×512", "read rate: 25.0 GB/s", "some matmul: 100 Gop/s"} <= labels


def test_a_picture_that_cannot_be_written_is_bad_data(tmp_path: Path) -> None:
    from nanochat_cli.errors import DataError

    (tmp_path / "file").write_text("")
    found = KernelMeasurements("m", "r", 1e9, "p", 1e9, points=[Point(Product(1, 128, 1), 1.0, 100)])
    with pytest.raises(DataError, match="cannot write"):
        plot_roofline(found, tmp_path / "file" / "roofline.png")
