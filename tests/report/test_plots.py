"""What a figure shows is what the metrics hold."""

import struct
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nanochat_cli.errors import DataError
from nanochat_cli.report.plots import plot_run, run_figure, text_curve

RECORDS = [
    *({"step": s, "tokens": s * 1000, "seconds": s * 0.5, "loss/main": 9.0 - s / 50} for s in range(10, 201, 10)),
    {"step": 100, "tokens": 100_000, "seconds": 52.0, "eval/loss": 7.5, "eval/bits_per_byte": 2.5},
    {"step": 200, "tokens": 200_000, "seconds": 104.0, "eval/loss": 5.5, "eval/bits_per_byte": 2.125},
]
BASELINES = {"gzip -9": 2.31, "xz": 2.05}


def curves(axes: Axes) -> list[list[tuple[float, float]]]:
    lines = [np.asarray(line.get_xydata()) for line in axes.get_lines()]
    return [[(float(x), float(y)) for x, y in line] for line in lines if len(line)]


def test_losses_and_bits_per_byte_are_drawn_over_tokens_with_the_baselines() -> None:
    loss_axes, byte_axes = run_figure(RECORDS, title="quickstart", baselines=BASELINES).axes[:2]
    assert curves(loss_axes) == [
        [(s * 1000.0, pytest.approx(9.0 - s / 50)) for s in range(10, 201, 10)],
        [(100_000.0, 7.5), (200_000.0, 5.5)],
    ]
    assert [line[0][1] for line in curves(byte_axes)[:2]] == [2.31, 2.05]
    assert curves(byte_axes)[2] == [(100_000.0, 2.5), (200_000.0, 2.125)]
    assert [text.get_text() for text in byte_axes.texts] == ["xz\n2.050", "this model\n2.125", "gzip -9\n2.310"]


@pytest.mark.parametrize("baselines", [{"gzip": 9.0, "xz": 0.5}, {"gzip": 2.1251, "xz": 2.124}, {}])
def test_every_baseline_is_inside_the_picture_and_no_name_covers_another(baselines: dict[str, float]) -> None:
    figure = run_figure(RECORDS, title="run", baselines=baselines)
    FigureCanvasAgg(figure).draw()
    byte_axes = figure.axes[1]
    low, high = byte_axes.get_ylim()
    assert all(low < value < high for value in [2.125, 2.5, *baselines.values()])
    boxes = sorted((text.get_window_extent() for text in byte_axes.texts), key=lambda box: box.y0)
    assert len(boxes) == len(baselines) + 1  # and the model
    assert all(lower.y1 <= upper.y0 for lower, upper in pairwise(boxes))
    assert all(0 <= box.x0 < box.x1 <= 1200 for box in boxes)


def test_axes_have_titles_and_units() -> None:
    figure = run_figure(RECORDS, title="quickstart", baselines=BASELINES)
    loss_axes, byte_axes = figure.axes[:2]
    assert figure.get_suptitle() == "quickstart"
    assert loss_axes.get_ylabel() == "loss (nats per token)"
    assert byte_axes.get_ylabel() == "bits per byte, held-out documents"
    assert byte_axes.get_xlabel() == "training tokens"
    legend = loss_axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training", "held-out"]


@pytest.mark.parametrize(
    ("seconds", "label", "shown"), [(104.0, "seconds", 104.0), (1200.0, "minutes", 20.0), (36_000.0, "hours", 10.0)]
)
def test_the_time_axis_shows_the_time_at_each_token_count(seconds: float, label: str, shown: float) -> None:
    records = [
        {"step": 1, "tokens": 500, "seconds": seconds * 0.75, "loss/main": 3.0},
        {"step": 2, "tokens": 1000, "seconds": seconds, "loss/main": 2.0},
    ]
    figure = run_figure(records, title="run")
    figure.axes[1].set_xlim(0, 1000)
    FigureCanvasAgg(figure).draw()
    (time_axis,) = figure.axes[0].child_axes
    assert time_axis.get_xlabel() == f"training time ({label})"
    assert time_axis.get_xlim() == pytest.approx((0, shown))
    figure.axes[1].set_xlim(0, 500)
    FigureCanvasAgg(figure).draw()
    assert time_axis.get_xlim() == pytest.approx((0, shown * 0.75))


def test_a_run_without_evaluations_says_so() -> None:
    byte_axes = run_figure(RECORDS[:20], title="run").axes[1]
    assert [text.get_text() for text in byte_axes.texts] == ["not evaluated"]


def test_the_file_is_a_png_of_a_readable_size(tmp_path: Path) -> None:
    path = plot_run(RECORDS, tmp_path / "plots" / "curve.png", title="run", baselines=BASELINES)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:24]) == (1200, 1050)


def test_what_cannot_be_drawn_or_written_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run: the metrics hold no losses"):
        run_figure([{"step": 1, "tokens": 10, "seconds": 1.0}], title="run")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write .*curve.png"):
        plot_run(RECORDS, tmp_path / "file" / "curve.png", title="run")


def test_the_text_curve_prefers_bits_per_byte_once_there_are_two() -> None:
    assert "held-out bits per byte" in text_curve(RECORDS, BASELINES)
    assert "gzip -9 2.310" in text_curve(RECORDS, BASELINES)
    assert "training loss, nats per token" in text_curve(RECORDS[:-1], BASELINES)
    assert text_curve([]) == ""
