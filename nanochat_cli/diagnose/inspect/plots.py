"""Pictures of an inspection, as PNG."""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli.diagnose.inspect.isometry import MatrixIsometry
from nanochat_cli.diagnose.inspect.ternary import LayerHealth
from nanochat_cli.report.plots import new_figure, save_figure
from nanochat_cli.training.health.streams import StreamReport
from nanochat_cli.training.health.ternary import MARGIN_EDGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DPI = 120


def plot_ternary(layers: Sequence[LayerHealth], out: Path) -> Path:
    """Zeros and weights at a threshold by layer, and the margins of all layers."""
    figure = new_figure(9, 4, dpi=_DPI)
    left, right = figure.subplots(1, 2)
    places = range(len(layers))
    left.plot(places, [layer.statistics.zero_fraction for layer in layers], marker=".", label="zero codes")
    left.plot(places, [layer.statistics.margin_histogram[0] for layer in layers], marker=".", label="at a threshold")
    left.set(xlabel="ternary layer, in the order of the table", ylabel="share of weights", ylim=(0, 1))
    _count_layers(left)
    left.legend()
    weights = [layer.statistics.weights for layer in layers]
    shares = [
        sum(layer.statistics.margin_histogram[i] * n for layer, n in zip(layers, weights, strict=True)) / sum(weights)
        for i in range(len(MARGIN_EDGES))
    ]
    _histogram(right, shares)
    return save_figure(figure, out)


def _histogram(axes: "Axes", shares: Sequence[float]) -> None:
    """Bars in true width whose areas are the shares; the last bin, open above, is a number at its edge."""
    widths = [high - low for low, high in pairwise(MARGIN_EDGES)]
    densities = [share / width for share, width in zip(shares, widths, strict=False)]
    axes.bar(MARGIN_EDGES[:-1], densities, widths, align="edge", edgecolor="white", linewidth=0.8)
    axes.text(
        0.98, 0.96, f"{shares[-1]:.1%} at {MARGIN_EDGES[-1]:g} or more", ha="right", va="top", transform=axes.transAxes
    )
    axes.set(
        xlim=(0, MARGIN_EDGES[-1]),
        xlabel="distance to the nearer threshold, in scales",
        ylabel="share of weights per scale of distance",
    )


def plot_streams(report: StreamReport, out: Path) -> Path:
    """The mean mixing matrix of every sublayer, and identity mass and diversity by depth."""
    layers = report.layers
    columns = min(8, len(layers))
    rows = -(-len(layers) // columns)
    figure = new_figure(1.3 * columns, 1.4 * rows + 2.4, dpi=_DPI)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.0] * rows + [1.6])
    for index, layer in enumerate(layers):
        axes = figure.add_subplot(grid[index // columns, index % columns])
        axes.imshow(layer.matrix, vmin=0, vmax=1, cmap="viridis")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(layer.name.replace("blocks.", "").replace("_mix", ""), fontsize=7)
    axes = figure.add_subplot(grid[rows, :])
    axes.plot([layer.alpha for layer in layers], marker=".", label="identity mass")
    axes.plot([layer.diversity for layer in layers], marker=".", label="stream diversity")
    axes.set(xlabel="sublayer", ylabel="share", ylim=(0, None))
    _count_layers(axes)
    axes.legend()
    return save_figure(figure, out)


def plot_isometry(layers: Sequence[MatrixIsometry], out: Path) -> Path:
    """Deviation from isometry, distance to it and condition number by depth."""
    figure = new_figure(9, 4, dpi=_DPI)
    left, right = figure.subplots(1, 2)
    left.plot([layer.against_random for layer in layers], marker=".", label="deviation, of a random matrix's")
    left.plot([layer.relative_sfe for layer in layers], marker=".", label="SFE to the isometry, of ‖W‖²")
    left.axhline(1, color="gray", linewidth=0.8)
    left.set(xlabel="matrix, in the order of the table", ylabel="ratio", ylim=(0, None))
    left.legend()
    places = [index for index, layer in enumerate(layers) if math.isfinite(layer.condition)]
    right.semilogy(places, [layers[index].condition for index in places], marker=".", linestyle="")
    right.set(xlabel="matrix, in the order of the table", ylabel="condition number")
    for axes in (left, right):
        _count_layers(axes)
    return save_figure(figure, out)


def _count_layers(axes: "Axes") -> None:
    """Ticks at whole numbers, as many as fit."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
