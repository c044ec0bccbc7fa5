"""Plots of a run: loss and held-out bits per byte over tokens, with the time on a second axis.

Knows the records of `metrics_log.read_metrics` and matplotlib (Agg, imported on use, without touching its global
state). `report.text_plot` draws the same curve as text.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanochat_cli.atomic_write import whole
from nanochat_cli.errors import DataError
from nanochat_cli.report.metrics_log import series
from nanochat_cli.report.text_plot import line_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_LOSS = "loss/main"
HELD_OUT_LOSS = "eval/loss"
BITS_PER_BYTE = "eval/bits_per_byte"

_TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_BLUE, _ORANGE, _GREY = "#2b6cb0", "#c05621", "#4a5568"


def plot_run(
    records: Sequence[Mapping[str, Any]], out: Path, *, title: str, baselines: Mapping[str, float] | None = None
) -> Path:
    """Write the figure of `run_figure` as PNG; returns its path. Raises DataError if that fails."""
    return save_figure(run_figure(records, title=title, baselines=baselines), out)


def save_figure(figure: "Figure", out: Path) -> Path:
    """Write a figure as PNG; returns its path. Raises DataError if that fails."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with whole(out) as temporary:
            figure.savefig(temporary, format="png")
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; free space or choose another place") from error
    return out


def new_figure(width: float, height: float, *, dpi: int = 150) -> "Figure":
    """An empty figure, in inches, with its own canvas. Its axes make room for their labels when it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def run_figure(
    records: Sequence[Mapping[str, Any]], *, title: str, baselines: Mapping[str, float] | None = None
) -> "Figure":
    """The loss above and the held-out bits per byte below, over training tokens.

    records: need `tokens`, `seconds` and any of `loss/main`, `eval/loss`, `eval/bits_per_byte`.
    baselines: bits per byte of compressors on the same held-out files, such as {"gzip -9": 2.31}.
    Raises DataError if there is nothing to draw.
    """
    from matplotlib.ticker import EngFormatter

    curves = {name: series(records, "tokens", name) for name in (TRAINING_LOSS, HELD_OUT_LOSS, BITS_PER_BYTE)}
    if not any(x for x, _ in curves.values()):
        raise DataError(f"{title}: the metrics hold no losses to draw; train for at least train.log_interval steps")
    figure = new_figure(8, 7)
    loss_axes, byte_axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 1.15))
    figure.suptitle(title, fontsize=13, fontweight="bold")
    _draw_losses(loss_axes, curves[TRAINING_LOSS], curves[HELD_OUT_LOSS])
    _draw_bits_per_byte(byte_axes, curves[BITS_PER_BYTE], baselines or {})
    byte_axes.set_xlabel("training tokens")
    byte_axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    byte_axes.set_xlim(left=0)
    _add_time_axis(loss_axes, *series(records, "tokens", "seconds"))
    return figure


def text_curve(records: Sequence[Mapping[str, Any]], baselines: Mapping[str, float] | None = None) -> str:
    """The curve for a terminal: held-out bits per byte if it was measured at least twice, else the training loss."""
    x, y = series(records, "tokens", BITS_PER_BYTE)
    if len(x) >= 2:
        return line_plot(x, y, title="held-out bits per byte", x_label="tokens", references=baselines)
    x, y = series(records, "tokens", TRAINING_LOSS)
    return line_plot(x, y, title="training loss, nats per token", x_label="tokens")


def _draw_losses(
    axes: "Axes", training: tuple[list[float], list[float]], held_out: tuple[list[float], list[float]]
) -> None:
    if training[0]:
        noisy = len(training[0]) > 40
        axes.plot(*training, color=_BLUE, linewidth=0.8 if noisy else 1.5, alpha=0.35 if noisy else 1.0)
        if noisy:
            axes.plot(training[0], _smoothed(training[1]), color=_BLUE, linewidth=1.6)
        axes.plot([], [], color=_BLUE, label="training" + (" (thick: smoothed)" if noisy else ""))
    if held_out[0]:
        axes.plot(*held_out, color=_ORANGE, marker="o", markersize=3.5, linewidth=1.4, label="held-out")
    axes.set_ylabel("loss (nats per token)")
    axes.set_ylim(*focus_range([*_smoothed(training[1]), *held_out[1]]))
    finish_axes(axes)
    axes.legend(frameon=False, loc="upper right")


def _draw_bits_per_byte(
    axes: "Axes", held_out: tuple[list[float], list[float]], baselines: Mapping[str, float]
) -> None:
    x, y = held_out
    low, high = focus_range(y)
    low, high = min([low, *baselines.values()]), max([high, *baselines.values()])
    axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    for value in baselines.values():
        axes.axhline(value, color=_GREY, linestyle="--", linewidth=1.1)
    names = [(value, f"{name}\n{value:.3f}", _GREY) for name, value in baselines.items()]
    if x:
        axes.plot(x, y, color=_ORANGE, marker="o", markersize=3.5, linewidth=1.6)
        names.append((y[-1], f"this model\n{y[-1]:.3f}", _ORANGE))
    else:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color=_GREY)
    _name_at_the_right(axes, names, apart=0.11 * (high - low))
    axes.set_ylabel("bits per byte, held-out documents")
    finish_axes(axes)


def _name_at_the_right(axes: "Axes", names: Sequence[tuple[float, str, str]], *, apart: float) -> None:
    """Write (y, text, color) beside the axes at height y, or higher if the one below needs the space."""
    lowest = float("-inf")
    for value, text, color in sorted(names):
        place = max(value, lowest)
        lowest = place + apart
        axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", color=color, fontsize=9)


def _add_time_axis(axes: "Axes", tokens: list[float], seconds: list[float]) -> None:
    """A second x axis above, in time spent training; between records time is interpolated."""
    pairs = sorted({(0.0, 0.0), *zip(tokens, seconds, strict=True)})
    if len(pairs) < 2 or pairs[-1][1] <= 0:
        return
    name, unit = time_unit(pairs[-1][1])
    xs, ys = [pair[0] for pair in pairs], [pair[1] / unit for pair in pairs]
    axis = axes.secondary_xaxis("top", functions=(_interpolation(xs, ys), _interpolation(ys, xs)))
    axis.set_xlabel(f"training time ({name})")


def time_unit(longest: float) -> tuple[str, int]:
    """The unit for an axis that ends at `longest` seconds, and the seconds in it."""
    return next((name, unit) for name, unit in _TIME_UNITS if longest >= 5 * unit or unit == 1)


def _interpolation(xs: list[float], ys: list[float]) -> Callable[[Any], Any]:
    """Piecewise linear through the points, at the mean slope outside of them."""
    import numpy as np

    slope = (ys[-1] - ys[0]) / (xs[-1] - xs[0])

    def function(x: Any) -> Any:
        x = np.asarray(x, dtype=float)
        outside = np.minimum(x - xs[0], 0) + np.maximum(x - xs[-1], 0)
        return np.interp(x, xs, ys) + slope * outside

    return function


def finish_axes(axes: "Axes") -> None:
    """Grid and spines as in all our plots."""
    axes.grid(True, color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of about a thirtieth of the curve around each point."""
    reach = len(values) // 60
    windows = (values[max(i - reach, 0) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def focus_range(values: Iterable[float]) -> tuple[float, float]:
    """A y range for all values but a steep start, since the first losses would flatten everything else."""
    ordered = sorted(values)
    if not ordered:
        return 0.0, 1.0
    low, high = ordered[0], ordered[-1]
    bulk = ordered[int(0.9 * (len(ordered) - 1))]
    if len(ordered) > 10 and high - low > 3 * (bulk - low) > 0:
        high = low + 3 * (bulk - low)
    room = 0.06 * (high - low) or 0.5
    return low - room, high + room
