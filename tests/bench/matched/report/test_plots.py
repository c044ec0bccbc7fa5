"""The pictures of a comparison show the means, ranges and intervals of the suite, and none is drawn without data."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from nanochat_cli.bench.matched.report.plots import (
    claims_figure,
    curves_figure,
    mean_curve,
    measured_number,
    memory_figure,
    step_figure,
    write_pictures,
)
from nanochat_cli.bench.matched.report.summary import summarise_configs
from nanochat_cli.bench.matched.run_record import Point, RunRecord, Suite
from tests.bench.matched.report.suites import claim, every_status, record, suite, three_seeds


def pictures_of(folder: Path, made: Suite) -> dict[str, Path]:
    return write_pictures(folder, made, summarise_configs(made))


def test_files_are_pictures_that_are_not_blank(tmp_path: Path) -> None:
    files = pictures_of(tmp_path, three_seeds())
    assert sorted(files) == ["claims", "memory", "seconds", "step", "tokens"]
    for path in files.values():
        with Image.open(path) as picture:
            picture.verify()
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) >= 300
            colours = picture.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None
        white = next(count for count, colour in colours if colour == (255, 255, 255))
        assert len(colours) > 20
        assert 0.1 < white / sum(count for count, _ in colours) < 0.999


def test_nothing_is_drawn_when_nothing_was_measured(tmp_path: Path) -> None:
    empty = RunRecord("baseline", 1, "failed", "no data", "baseline-1", None, {}, [], {})
    assert pictures_of(tmp_path, suite([empty])) == {}
    assert list(tmp_path.iterdir()) == []


def test_every_status_can_be_drawn(tmp_path: Path) -> None:
    assert sorted(pictures_of(tmp_path, every_status())) == ["memory", "seconds", "step", "tokens"]


def test_the_line_over_tokens_is_the_mean_and_the_band_holds_every_seed() -> None:
    figure = curves_figure(three_seeds(), "tokens")
    assert figure is not None
    axes = figure.axes[0]
    line = np.asarray(axes.get_lines()[0].get_xydata())
    assert line[:, 0].tolist() == [1024, 2048, 4096, 8192]
    assert line[-1, 1] == pytest.approx(1.75 + 2 / 128)
    vertices = axes.collections[0].get_paths()[0].vertices
    at_the_end = np.asarray(vertices)[np.asarray(vertices)[:, 0] == 8192, 1]
    assert (at_the_end.min(), at_the_end.max()) == pytest.approx((1.75 + 1 / 128, 1.75 + 3 / 128))
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["baseline", "mtp-only", "muon-8bit"]


def test_one_seed_has_no_band_and_an_unfinished_run_is_a_separate_line() -> None:
    figure = curves_figure(every_status(), "seconds")
    assert figure is not None
    axes = figure.axes[0]
    assert len(axes.collections) == 0
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels[0] == "baseline"
    assert "stopped, seed 1: interrupted" in labels
    FigureCanvasAgg(figure).draw()  # a name with dollar signs is not mathematics


def test_the_mean_of_curves_is_over_the_range_that_they_share() -> None:
    first, second = ([0.0, 2.0, 4.0], [4.0, 2.0, 0.0]), ([1.0, 3.0], [5.0, 1.0])
    grid, mean, low, high = mean_curve([first, second])
    assert grid == [1.0, 2.0, 3.0]
    assert mean == [4.0, 2.5, 1.0]
    assert low == [3.0, 2.0, 1.0]
    assert high == [5.0, 3.0, 1.0]
    assert mean_curve([([1.0], [3.0]), ([2.0], [5.0])]) == ([1.0], [3.0], [3.0], [3.0])


def test_the_last_of_two_evaluations_of_one_step_is_drawn() -> None:
    run = record("baseline", 1)
    run.evaluations.append(Point(8, 8192, 12.8, 1.5, 4.0))
    figure = curves_figure(suite([run]), "tokens")
    assert figure is not None
    assert np.asarray(figure.axes[0].get_lines()[0].get_xydata())[-1].tolist() == [8192, 1.5]


def test_bars_are_the_means_and_missing_ones_are_named() -> None:
    runs = [record("baseline", 1), record("other", 1, without=frozenset({"peak_memory_bytes"}))]
    figure = memory_figure(suite(runs), summarise_configs(suite(runs)))
    assert figure is not None
    state, peak = figure.axes
    assert [bar.get_width() for bar in state.patches] == [45.0, 45.0]  # pyright: ignore[reportAttributeAccessIssue]
    assert [bar.get_width() for bar in peak.patches] == [pytest.approx(612.345679)]  # pyright: ignore[reportAttributeAccessIssue]
    assert " not measured" in [text.get_text() for text in peak.texts]


def test_a_step_is_stacked_from_its_parts() -> None:
    figure = step_figure(summarise_configs(suite([record("baseline", 1)])))
    assert figure is not None
    bars = [(bar.get_x(), bar.get_width()) for bar in figure.axes[0].patches]  # pyright: ignore[reportAttributeAccessIssue]
    assert bars == [(0, 600), (600, 700), (1300, 150), (1450, 20)]
    assert np.asarray(figure.axes[0].collections[0].get_offsets()).tolist() == [[1500, 0]]


@pytest.mark.parametrize("configs", [["baseline"], ["baseline", "other"]])
def test_a_step_without_phases_is_a_bar_and_the_legend_names_only_what_is_drawn(configs: list[str]) -> None:
    phases = frozenset({"forward_ms", "backward_ms", "optimizer_ms"})
    runs = [record(config, 1, without=phases if config == "baseline" else frozenset()) for config in configs]
    figure = step_figure(summarise_configs(suite(runs)))
    assert figure is not None
    axes = figure.axes[0]
    bars = {(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_y() < 0.5}  # pyright: ignore[reportAttributeAccessIssue]
    assert bars == {(0, 1500)}
    legend = axes.get_legend()
    assert legend is not None
    drawn = [text.get_text() for text in legend.get_texts()]
    assert "step, parts not measured" in drawn
    assert len(drawn) == (1 if configs == ["baseline"] else 6)


def test_a_claim_shows_interval_value_and_expected_range() -> None:
    figure = claims_figure(three_seeds())
    assert figure is not None
    assert len(figure.axes) == 2  # the third claim has no number
    first, second = figure.axes
    drawn = [np.asarray(line.get_xdata()).tolist() for line in first.get_lines()]
    assert drawn == [[1.1, 1.1], [1.2, 1.2], [1.125, 1.188], [1.152]]
    (shade,) = first.patches
    assert (shade.get_x(), shade.get_width()) == pytest.approx((1.1, 0.1))  # pyright: ignore[reportAttributeAccessIssue]
    colours = (
        {line.get_color() for line in first.get_lines()[2:]},
        {line.get_color() for line in second.get_lines()[1:]},
    )
    assert colours == ({"#2f855a"}, {"#c53030"})
    (open_ended,) = second.patches
    assert open_ended.get_x() + open_ended.get_width() == pytest.approx(second.get_xlim()[1])  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.152 ×", 1.152),
        ("−0.03 bits", -0.03),
        ("12 % of it", 12.0),
        ("1.2e+04 tokens", 12000.0),
        ("8bit-only was not run", None),
        ("not reached in 3 runs", None),
    ],
)
def test_the_number_of_a_claim_is_the_one_its_text_begins_with(text: str, value: float | None) -> None:
    assert measured_number(claim(measured=text)) == value
