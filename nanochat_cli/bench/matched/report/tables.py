"""The tables of a comparison as text cells: runs, times of a step, claims, learning rates, failures, every measure.

One definition for the terminal, Markdown and HTML. Knows how to write a number with its unit; no markup.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nanochat_cli.bench.matched.report.summary import ConfigSummary, Spread
from nanochat_cli.bench.matched.run_record import FINISHED, MEASURES, Suite
from nanochat_cli.report.quantities import format_duration, format_quantity
from nanochat_cli.report.result_file import Claim
from nanochat_cli.report.statistics import interval_name

NONE = "—"
STEP_PARTS = ("forward_ms", "backward_ms", "optimizer_ms", "data_wait_ms")
"""The measured parts of a step."""

_RUN_MEASURES = {
    "tokens_to_baseline": "tokens to baseline",
    "seconds_to_baseline": "time to baseline",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "peak memory",
    "optimizer_state_bytes": "optimizer state",
    "gguf_bytes": "GGUF file",
    "train_seconds": "training time",
}
_STEP_MEASURES = {
    "step_ms": "step, ms",
    "forward_ms": "forward, ms",
    "backward_ms": "backward, ms",
    "optimizer_ms": "optimizer, ms",
    "data_wait_ms": "wait for data, ms",
    "busy_fraction": "busy",
    "gpu_utilisation": "GPU busy",
    "kept_fraction": "tokens kept",
}


@dataclass(frozen=True)
class Table:
    """Every row has one cell per column."""

    columns: list[str]
    rows: list[list[str]]


def runs_table(summaries: Sequence[ConfigSummary], *, short: bool = False) -> Table:
    """One row per configuration: means over seeds with their range, the paired difference, and the status.

    short: leave out the columns for which a narrow terminal has no room.
    """
    columns: dict[str, Callable[[ConfigSummary], str]] = {
        "configuration": lambda s: s.config,
        "seeds": lambda s: (
            str(len(s.finished)) if len(s.finished) == len(s.runs) else f"{len(s.finished)}/{len(s.runs)}"
        ),
        "bits per byte": lambda s: _with_range(s.measures.get("bits_per_byte"), "bits/byte"),
        "− baseline": lambda s: _with_range(s.differences.get("bits_per_byte"), "bits/byte", signed=True),
    }
    left_out = {"tokens_to_baseline", "gguf_bytes", "train_seconds"} if short else set()
    columns |= _means({name: title for name, title in _RUN_MEASURES.items() if name not in left_out})
    columns["status"] = status_of
    return _filled(columns, summaries)


def step_table(summaries: Sequence[ConfigSummary]) -> Table:
    """One row per configuration: times of a step in ms and shares, means over seeds."""
    return _filled({"configuration": lambda s: s.config, **_means(_STEP_MEASURES)}, summaries)


def claims_table(claims: Sequence[Claim], *, short: bool = False) -> Table:
    """One row per claim, with its interval under the name that suits the number of seeds. short: without the source."""
    interval = interval_name(min((claim.seeds for claim in claims if claim.interval and claim.seeds), default=0))
    columns = ["claim", "expected", "measured", interval, "seeds", "verdict", "source"]
    rows = [
        [
            claim.statement,
            claim.expected,
            claim.measured,
            NONE if claim.interval is None else " … ".join(_end(end, claim.unit) for end in claim.interval),
            NONE if claim.seeds is None else str(claim.seeds),
            claim.verdict,
            claim.source,
        ]
        for claim in claims
    ]
    return Table(columns[:-1], [row[:-1] for row in rows]) if short else Table(columns, rows)


def rates_table(tuned: Mapping[str, Any]) -> Table:
    """One row per configuration: the chosen rate, and the outcome of every rate that was tried."""
    grids: Mapping[str, Mapping[Any, float | None]] = tuned["tried"]
    width = max((len(grid) for grid in grids.values()), default=0)
    rows = []
    for name, grid in grids.items():
        cells = [f"{float(rate):g}: {_cell(bits, 'bits/byte')}" for rate, bits in grid.items()]
        chosen = tuned["chosen"].get(name)
        rows.append([name, "its own" if chosen is None else f"{chosen:g}", *cells, *[NONE] * (width - len(cells))])
    return Table(["configuration", "chosen", *(f"rate {n}" for n in range(1, width + 1))], rows)


def unfinished_table(suite: Suite) -> Table:
    """One row per run that did not finish."""
    rows = [
        [run.config, str(run.seed), run.status, " ".join((run.reason or NONE).split()), run.run]
        for run in suite.runs
        if run.status != FINISHED
    ]
    return Table(["configuration", "seed", "status", "reason", "folder"], rows)


def folders_table(suite: Suite) -> Table:
    """One row per run, with its held-out bits per byte and its folder."""
    rows = [
        [run.config, str(run.seed), run.status, _cell(run.measures.get("bits_per_byte"), "bits/byte"), run.run]
        for run in suite.runs
    ]
    return Table(["configuration", "seed", "status", "bits per byte", "folder"], rows)


def measures_table(summaries: Sequence[ConfigSummary]) -> Table:
    """Every measure of every configuration, to six digits, in the unit of the result file."""
    columns = ["configuration", "measure", "unit", "mean", "low", "high", "seeds", "− baseline", "low", "high"]
    rows = []
    for summary in summaries:
        for name, own in summary.measures.items():
            measure, difference = MEASURES[name], summary.differences.get(name)
            values = [f"{value:.6g}" for value in (own.mean, own.low, own.high)]
            differences = [NONE] * 3
            if difference is not None:
                differences = [f"{value:+.6g}" for value in (difference.mean, difference.low, difference.high)]
            rows.append([summary.config, measure.title, measure.unit, *values, str(own.count), *differences])
    return Table(columns, rows)


def status_of(summary: ConfigSummary) -> str:
    """ "finished", or the status of the seeds that did not finish."""
    others = [run for run in summary.runs if run.status != FINISHED]
    if not others:
        return FINISHED
    if len(summary.runs) == 1:
        return others[0].status
    return "; ".join(f"seed {run.seed}: {run.status}" for run in others)


def format_measure(value: float, unit: str, *, signed: bool = False) -> str:
    """A value for people: bytes in MB, shares in %, seconds as h:mm:ss from a minute on."""
    sign = ("−" if value < 0 else "+" if value > 0 else "") if signed or value < 0 else ""
    size = abs(value)
    if unit == "B":
        text = format_quantity(size, "B")
    elif unit == "share":
        text = f"{size:.1%}"
    elif unit == "bits/byte":
        text = f"{size:.4f}"
    elif unit == "s" and size >= 60:
        text = format_duration(size)
    else:
        text = number(size)
    return sign + (f"{text} s" if unit == "s" and size < 60 else text)


def number(value: float) -> str:
    """Four significant digits, or all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plain_value(value: Any) -> str:
    """A configuration or environment value as in TOML, without the quotes."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return ", ".join(plain_value(item) for item in value) or "none"
    return "none" if value is None else str(value)


def _end(value: float, unit: str | None) -> str:
    return f"{number(100 * value)} %" if unit == "share" else number(value)


def _cell(value: float | None, unit: str) -> str:
    return NONE if value is None else format_measure(value, unit)


def _means(measures: dict[str, str]) -> dict[str, Callable[[ConfigSummary], str]]:
    return {title: lambda s, name=name: _cell(s.mean(name), MEASURES[name].unit) for name, title in measures.items()}


def _filled(columns: dict[str, Callable[[ConfigSummary], str]], summaries: Sequence[ConfigSummary]) -> Table:
    """The table without columns in which nothing was measured; the first column always stays."""
    cells = {title: [cell(summary) for summary in summaries] for title, cell in columns.items()}
    first = next(iter(columns))
    kept = [title for title, column in cells.items() if title == first or any(text != NONE for text in column)]
    return Table(kept, [[cells[title][i] for title in kept] for i in range(len(summaries))])


def _with_range(spread: Spread | None, unit: str, *, signed: bool = False) -> str:
    if spread is None:
        return NONE
    mean, low, high = (format_measure(v, unit, signed=signed) for v in (spread.mean, spread.low, spread.high))
    return mean if spread.count == 1 else f"{mean} ({low} … {high})"
