"""Curves as text: a one-line sparkline, and a plot of a few lines in braille dots for the terminal.

Knows numbers and characters.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from nanochat_cli.report.quantities import format_quantity

BLOCKS = "▁▂▃▄▅▆▇█"
# Bits of the eight dots of a braille cell (U+2800 + bits), by row and column.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Finite values as at most `width` block characters, averaged if there are more."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    cells = _averaged(finite, width)
    low, high = min(cells), max(cells)
    top = len(BLOCKS) - 1
    if high == low:
        return BLOCKS[0] * len(cells)
    return "".join(BLOCKS[round((value - low) / (high - low) * top)] for value in cells)


def line_plot(
    x: Sequence[float],
    y: Sequence[float],
    *,
    title: str = "",
    x_label: str = "",
    references: Mapping[str, float] | None = None,
    width: int = 64,
    height: int = 10,
) -> str:
    """A curve as `height` lines of braille with axes, joined by newlines; empty with fewer than two points.

    references: name → y of horizontal lines, drawn dotted and named at the right; the y range includes them.
    """
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if len(points) < 2:
        return ""
    references = references or {}
    columns, rows = 2 * width, 4 * height
    low, high = _range([b for _, b in points] + list(references.values()))
    left, right = _range([a for a, _ in points])

    def row_of(value: float) -> int:
        return round((high - value) / (high - low) * (rows - 1))

    cells = [[0] * width for _ in range(height)]

    def dot(column: int, row: int) -> None:
        cells[row // 4][column // 2] |= _DOTS[row % 4][column % 2]

    for value in references.values():
        for column in range(0, columns, 4):
            dot(column, row_of(value))
    previous: tuple[int, int] | None = None
    for a, b in points:
        column, row = round((a - left) / (right - left) * (columns - 1)), row_of(b)
        for step_column, step_row in _segment(previous or (column, row), (column, row)):
            dot(step_column, step_row)
        previous = column, row

    names: dict[int, list[str]] = {}
    for name, value in sorted(references.items(), key=lambda item: -item[1]):
        names.setdefault(row_of(value) // 4, []).append(f"{name} {value:.3f}")
    ticks = {0: f"{high:.3g}", height // 2: f"{high - (height // 2) / (height - 1) * (high - low):.3g}"}
    ticks[height - 1] = f"{low:.3g}"
    margin = max(len(tick) for tick in ticks.values())
    lines = [" " * (margin + 1) + title] if title else []
    for index, row in enumerate(cells):
        tick, axis = ticks.get(index, ""), "┤" if index in ticks else "│"
        text = "".join(chr(0x2800 + bits) if bits else " " for bits in row)
        lines.append(f"{tick.rjust(margin)} {axis}{text} {', '.join(names.get(index, []))}".rstrip())
    lines.append(" " * (margin + 1) + "└" + "─" * width)
    ends = format_quantity(left, ""), format_quantity(right, x_label)
    lines.append(" " * (margin + 2) + ends[0] + ends[1].rjust(width - len(ends[0])))
    return "\n".join(lines)


def _averaged(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of consecutive, equally long runs of values."""
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def _segment(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The grid points of a straight line, both ends included."""
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / count), round(start[1] + (end[1] - start[1]) * i / count))
        for i in range(count + 1)
    ]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest value, moved apart if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
