"""The roofline picture (Williams et al., doi:10.1145/1498765.1498785) of measured products.

Both lines are measured in the same run: the slope is the memory roof; the horizontal is a named matmul, which is for
comparison and not a limit, since int8 products may exceed it. Knows matplotlib and the points of `kernels`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli.bench.micro.kernels import KernelMeasurements
from nanochat_cli.report.plots import finish_axes, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GREY = "#4a5568"
_COLOURS = "#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#975a16"


def plot_roofline(measurements: KernelMeasurements, out: Path) -> Path:
    """Writes `roofline_figure` as PNG. Raises DataError."""
    return save_figure(roofline_figure(measurements), out)


def roofline_figure(measurements: KernelMeasurements) -> "Figure":
    """Operations per second over operations per byte, both logarithmic, one point per product."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure = new_figure(8, 5.5)
    axes = figure.subplots()
    figure.suptitle("packed ternary products, activations quantised on the way", fontsize=13, fontweight="bold")
    axes.set_title(measurements.device, fontsize=10, color=_GREY)
    intensities = [point.intensity for point in measurements.points]
    low, high = min(intensities) / 2, max(intensities) * 3
    top = max([measurements.peak, *(point.rate for point in measurements.points)]) * 2
    end = min(high, top / measurements.roof)
    axes.plot([low, end], [low * measurements.roof, end * measurements.roof], color=_GREY, linewidth=1.4)
    start = low * 1.15
    roof = f"{measurements.memory_roof}: {measurements.roof / 1e9:.1f} GB/s"
    place = {"textcoords": "offset points", "fontsize": 9, "color": _GREY}
    axes.annotate(roof, (start, start * measurements.roof), (8, -3), **place)
    axes.axhline(measurements.peak, color=_GREY, linestyle="--", linewidth=1.1)
    peak = f"{measurements.peak_name}: {measurements.peak / 1e9:,.0f} Gop/s"
    axes.annotate(peak, (high, measurements.peak), (-4, 4), ha="right", **place)
    for tokens, color in zip(sorted({point.product.tokens for point in measurements.points}), _COLOURS, strict=False):
        points = [point for point in measurements.points if point.product.tokens == tokens]
        axes.scatter([p.intensity for p in points], [p.rate for p in points], color=color, s=28, label=f"M = {tokens}")
        for point in points:
            text = f"{point.product.rows}×{point.product.columns}"
            if point.product.granularity != "row":
                text += f", scale {point.product.granularity}"
            place = (point.intensity, point.rate)
            axes.annotate(text, place, (6, -3), textcoords="offset points", fontsize=8, color=color)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(min(low * measurements.roof, *(point.rate for point in measurements.points)) / 1.5, top)
    axes.set_xlabel("operations per byte moved")
    axes.set_ylabel("operations per second")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(EngFormatter(sep=""))
        axis.set_minor_formatter(NullFormatter())
    finish_axes(axes)
    axes.legend(frameon=False, loc="lower right")
    return figure
