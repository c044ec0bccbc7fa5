"""The pictures of a comparison: curves, memory, times of a step, intervals of claims.

Knows a Suite and matplotlib (imported on use). A picture for which nothing was measured is not drawn.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nanochat_cli.bench.matched.claims import NOT_SUPPORTED, SUPPORTED
from nanochat_cli.bench.matched.report.summary import ConfigSummary
from nanochat_cli.bench.matched.report.tables import STEP_PARTS, format_measure
from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, RunRecord, Suite
from nanochat_cli.report.plots import finish_axes, focus_range, new_figure, save_figure, time_unit
from nanochat_cli.report.result_file import Claim

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

XAxis = Literal["tokens", "seconds"]

_INK, _GREY, _SHADE = "#1a202c", "#4a5568", "#c6f6d5"
_COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#b7791f", "#2c7a7b", "#c53030")
_PHASES = ("forward_ms", "backward_ms", "optimizer_ms")
_UNPARTED = "#cbd5e0"
_LINE = 120
"""Characters that fit on one line above a picture."""
_DASHES = ("-", "--", ":")
_VERDICTS = {SUPPORTED: "#2f855a", NOT_SUPPORTED: "#c53030"}


def write_pictures(folder: Path, suite: Suite, summaries: Sequence[ConfigSummary]) -> dict[str, Path]:
    """PNG files by name: "tokens", "seconds", "memory", "step", "claims", without those that would be empty.

    Raises DataError.
    """
    figures = {
        "tokens": ("bits_per_byte_tokens.png", curves_figure(suite, "tokens")),
        "seconds": ("bits_per_byte_time.png", curves_figure(suite, "seconds")),
        "memory": ("memory.png", memory_figure(suite, summaries)),
        "step": ("step_time.png", step_figure(summaries)),
        "claims": ("claims.png", claims_figure(suite)),
    }
    return {name: save_figure(figure, folder / file) for name, (file, figure) in figures.items() if figure is not None}


def curves_figure(suite: Suite, x: XAxis) -> "Figure | None":
    """Held-out bits per byte over tokens or training time: the mean of the finished seeds, and a band over all of them.

    Runs that did not finish are thin separate lines. None if no run was evaluated.
    """
    from matplotlib.ticker import EngFormatter

    if not any(run.evaluations for run in suite.runs):
        return None
    figure = new_figure(9, 5.2)
    axes = figure.subplots()
    name, scale = ("", 1)
    if x == "seconds":
        name, scale = time_unit(max(point.seconds for run in suite.runs for point in run.evaluations))
    shown: list[float] = []
    for config, (colour, dash) in styles(suite).items():
        style: dict[str, Any] = {"color": colour, "linestyle": dash}
        runs = suite.of(config)
        finished = [curve for run in runs if run.status == FINISHED and (curve := _curve(run, x, scale))[0]]
        if finished:
            grid, mean, low, high = mean_curve(finished)
            marker = "o" if len(grid) <= 30 else None
            axes.plot(grid, mean, **style, marker=marker, markersize=3.5, linewidth=1.6, label=_text(config))
            if len(finished) > 1:
                axes.fill_between(grid, low, high, color=colour, alpha=0.15, linewidth=0)
            shown += [*low, *high]
        for run in runs:
            xs, ys = _curve(run, x, scale)
            if run.status != FINISHED and xs:
                label = _text(f"{config}, seed {run.seed}: {run.status}")
                axes.plot(xs, ys, **style, marker="x", markersize=5, linewidth=0.8, label=label)
                shown += ys
    axes.set_ylim(*focus_range(shown))
    axes.set_xlim(left=0)
    axes.set_ylabel("bits per byte, held-out documents")
    axes.set_xlabel("training tokens" if x == "tokens" else f"training time ({name})")
    if x == "tokens":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    finish_axes(axes)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def mean_curve(
    curves: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, smallest and largest y of curves with rising x, over the range that they share.

    x: every x of any curve in that range; a curve is linear between its points. Without a shared range: the points of
    the first curve.
    """
    import numpy as np

    start, end = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = sorted({float(x) for xs, _ in curves for x in xs if start <= x <= end})
    if not grid:
        grid, curves = list(curves[0][0]), curves[:1]
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in curves])
    return grid, values.mean(axis=0).tolist(), values.min(axis=0).tolist(), values.max(axis=0).tolist()


def memory_figure(suite: Suite, summaries: Sequence[ConfigSummary]) -> "Figure | None":
    """Bars of optimizer state and peak memory, means over seeds. None if neither was measured."""
    names = ("optimizer_state_bytes", "peak_memory_bytes")
    if not any(name in summary.measures for summary in summaries for name in names):
        return None
    figure = new_figure(9, 1.3 + 0.38 * len(summaries))
    for axes, name in zip(figure.subplots(1, 2, sharey=True), names, strict=True):
        for row, (summary, (colour, _)) in enumerate(zip(summaries, styles(suite).values(), strict=True)):
            if (mean := summary.mean(name)) is None:
                _not_measured(axes, row)
                continue
            axes.barh(row, mean / 1e6, color=colour, height=0.65)
            axes.text(mean / 1e6, row, f" {format_measure(mean, 'B')}", va="center", fontsize=8)
        _rows(axes, [summary.config for summary in summaries])
        axes.set_title(MEASURES[name].title, fontsize=10)
        axes.set_xlabel("MB")
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
    return figure


def step_figure(summaries: Sequence[ConfigSummary]) -> "Figure | None":
    """Stacked bars of the parts of a step, means over seeds; a black mark is the whole step. None without times.

    A configuration whose phases were not measured is one grey bar as long as its step.
    """
    unmeasured = [row for row, s in enumerate(summaries) if s.measures.keys().isdisjoint((*STEP_PARTS, "step_ms"))]
    if len(unmeasured) == len(summaries):
        return None
    figure = new_figure(9, 1.5 + 0.38 * len(summaries))
    axes = figure.subplots()
    parted = [row for row, summary in enumerate(summaries) if any(name in summary.measures for name in _PHASES)]
    left = dict.fromkeys(parted, 0.0)
    for name, colour in zip(STEP_PARTS, ("#2b6cb0", "#c05621", "#2f855a", "#a0aec0"), strict=True):
        widths = {row: summaries[row].mean(name) or 0.0 for row in parted}
        if any(widths.values()):
            label = MEASURES[name].title
            axes.barh(parted, list(widths.values()), left=list(left.values()), color=colour, height=0.65, label=label)
        left = {row: start + widths[row] for row, start in left.items()}
    steps = {row: value for row, summary in enumerate(summaries) if (value := summary.mean("step_ms")) is not None}
    if whole := {row: value for row, value in steps.items() if row not in left}:
        axes.barh(list(whole), list(whole.values()), color=_UNPARTED, height=0.65, label="step, parts not measured")
    if marked := {row: value for row, value in steps.items() if row in left}:
        axes.scatter(list(marked.values()), list(marked), marker="|", s=180, color=_INK, label="whole step", zorder=3)
    for row in unmeasured:
        _not_measured(axes, row)
    _rows(axes, [summary.config for summary in summaries])
    axes.set_xlim(left=0)
    axes.set_xlabel("ms per step")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return figure


def claims_figure(suite: Suite) -> "Figure | None":
    """One row per claim with its own axis: the interval, the measured value, and the expected range shaded.

    None if no claim has a number.
    """
    claims = [claim for claim in suite.claims if measured_number(claim) is not None or claim.interval is not None]
    if not claims:
        return None
    figure = new_figure(9, 0.4 + len(claims))
    for axes, claim in zip(figure.subplots(len(claims), 1, squeeze=False)[:, 0], claims, strict=True):
        _draw_claim(axes, claim)
    return figure


def measured_number(claim: Claim) -> float | None:
    """The number at the start of the measured text, percentages as shares; None for "8bit-only was not run"."""
    match = re.match(r"[-+−]?\d+(\.\d+)?(e[-+]?\d+)?(?=\s|$)", claim.measured)
    if match is None:
        return None
    value = float(match[0].replace("−", "-"))
    return value / 100 if claim.unit == "share" and claim.measured[match.end() :].startswith(" %") else value


def styles(suite: Suite) -> Mapping[str, tuple[str, str]]:
    """Colour and line style of every configuration; the baseline is black."""
    others = [config for config in suite.configs if config != suite.baseline]
    chosen = {suite.baseline: (_INK, "-")} if suite.baseline in suite.configs else {}
    for i, config in enumerate(others):
        chosen[config] = _COLOURS[i % len(_COLOURS)], _DASHES[i // len(_COLOURS) % len(_DASHES)]
    return chosen


def _curve(run: RunRecord, x: XAxis, scale: float) -> tuple[list[float], list[float]]:
    """Points with rising x; of several at one x only the last, which scores all held-out documents."""
    points = {getattr(point, x) / scale: point.bits_per_byte for point in run.evaluations}
    return sorted(points), [points[key] for key in sorted(points)]


def _not_measured(axes: "Axes", row: int) -> None:
    axes.text(0, row, " not measured", va="center", color=_GREY, fontsize=8)


def _rows(axes: "Axes", names: Sequence[str]) -> None:
    """Names at the left, the first one on top."""
    axes.set_yticks(range(len(names)), [_text(name) for name in names], fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    finish_axes(axes)


def _draw_claim(axes: "Axes", claim: Claim) -> None:
    from matplotlib.ticker import PercentFormatter

    # A verdict may end in caveats.
    colour = next((colour for verdict, colour in _VERDICTS.items() if claim.verdict.startswith(verdict)), _GREY)
    value, ends = measured_number(claim), [e for e in (claim.expected_low, claim.expected_high) if e is not None]
    known = [*ends, *(claim.interval or ()), *([] if value is None else [value])]
    room = 0.15 * (max(known) - min(known)) or 0.1 * abs(known[0]) or 1.0
    left, right = min(known) - room, max(known) + room
    if ends:
        low = left if claim.expected_low is None else claim.expected_low
        high = right if claim.expected_high is None else claim.expected_high
        axes.axvspan(low, high, color=_SHADE, linewidth=0)
        for end in ends:
            axes.axvline(end, color="#68d391", linewidth=1)
    if claim.interval is not None:
        axes.plot(claim.interval, (0, 0), color=colour, linewidth=2.2, marker="|", markersize=9)
    if value is not None:
        axes.plot([value], [0], color=colour, marker="o", markersize=6)
    if claim.unit == "share":
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlim(left, right)
    axes.set_ylim(-1, 1)
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    unit = f" ({claim.unit})" if claim.unit and claim.unit != "share" else ""
    title = "\n".join(textwrap.wrap(f"{claim.statement}{unit}: {claim.verdict}", _LINE))
    axes.set_title(_text(title), fontsize=9, loc="left", color=colour)


def _text(text: str) -> str:
    """The text, literally: matplotlib would set anything between two dollar signs as mathematics."""
    return text.replace("$", r"\$")
