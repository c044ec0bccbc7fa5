"""Text plots, read back: the characters are decoded to points and compared with the data."""

import math
import random

import pytest

from nanochat_cli.report.text_plot import BLOCKS, line_plot, sparkline


def dots(plot: str, margin: int, width: int, height: int) -> set[tuple[int, int]]:
    """(column, row) of every braille dot, by the Unicode names of the dots 1-8 (The Unicode Standard, 21.1)."""
    place = {1: (0, 0), 2: (0, 1), 3: (0, 2), 4: (1, 0), 5: (1, 1), 6: (1, 2), 7: (0, 3), 8: (1, 3)}
    found = set()
    for line_number, line in enumerate(plot.splitlines()[:height]):
        for column, character in enumerate(line[margin : margin + width]):
            bits = ord(character) - 0x2800
            for number, (x, y) in place.items():
                if bits > 0 and bits >> (number - 1) & 1:
                    found.add((2 * column + x, 4 * line_number + y))
    return found


def test_a_sparkline_rises_and_falls_with_its_values() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BLOCKS
    assert sparkline([7, 0, 3.4, 7]) == "█▁▄█"
    assert sparkline([5, 5, 5]) == "▁▁▁"
    assert sparkline([]) == ""
    assert sparkline([math.nan, 1, math.inf, 2]) == "▁█"


@pytest.mark.parametrize("count", [1, 39, 40, 41, 1000])
def test_a_sparkline_never_exceeds_its_width_and_keeps_the_trend(count: int) -> None:
    line = sparkline([float(-i) for i in range(count)], 40)
    assert len(line) == min(count, 40)
    assert [BLOCKS.index(block) for block in line] == sorted((BLOCKS.index(block) for block in line), reverse=True)


def test_every_point_of_a_curve_is_where_it_belongs() -> None:
    generator = random.Random(3)
    width, height = 30, 6
    x = sorted(generator.uniform(0, 1e6) for _ in range(25))
    y = [generator.gauss(0, 1) for _ in x]
    plot = line_plot(x, y, width=width, height=height)
    found = dots(plot, plot.splitlines()[0].index("┤") + 1, width, height)
    for a, b in zip(x, y, strict=True):
        column = round((a - min(x)) / (max(x) - min(x)) * (2 * width - 1))
        row = round((max(y) - b) / (max(y) - min(y)) * (4 * height - 1))
        assert (column, row) in found
    assert {column for column, _ in found} == set(range(2 * width)), "the curve has no gaps"


def test_axes_say_the_range_and_references_are_named_in_their_row() -> None:
    plot = line_plot(
        [0, 280_000], [4.0, 2.0], title="bits per byte", x_label="tokens", references={"xz": 3.0}, height=9
    )
    lines = plot.splitlines()
    assert lines[0].strip() == "bits per byte"
    assert lines[1].startswith("4 ┤")
    assert lines[5].startswith("3 ┤")
    assert lines[5].endswith("xz 3.000")
    assert lines[9].startswith("2 ┤")
    assert lines[-1].split() == ["0", "280.0K", "tokens"]


def test_fewer_than_two_points_make_no_plot() -> None:
    assert line_plot([1], [2]) == ""
    assert line_plot([1, 2], [math.nan, 2]) == ""
