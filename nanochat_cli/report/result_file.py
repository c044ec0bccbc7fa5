"""The format of every committed measurement: `{"suite", "environment", "results", "claims"}` as JSON.

A result compares a value with a named peer measured in the same process or run. `ratio` above 1 always means better
than the peer, so a ratio of times is peer / ours and a ratio of rates ours / peer.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.report.environment import blemish, environment
from nanochat_cli.report.quantities import format_quantity
from nanochat_cli.report.reporter import Reporter


@dataclass(frozen=True)
class Result:
    """One figure. runs: the individual measurements; spread: their smallest and largest; value: their median."""

    case: str
    metric: str
    value: float
    unit: str
    peer: str | None = None
    ratio: float | None = None
    runs: list[float] = field(default_factory=list)
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Claim:
    """A statement that was measured; verdict: as `bench.matched.claims` words it.

    interval: named by `report.statistics.interval_name(seeds)`; in `unit`, like expected_low and expected_high.
    """

    id: str
    statement: str
    source: str
    expected: str
    measured: str
    verdict: str
    interval: tuple[float, float] | None = None
    seeds: int | None = None
    expected_low: float | None = None
    expected_high: float | None = None
    unit: str | None = None


def summarise(
    case: str,
    metric: str,
    unit: str,
    runs: Sequence[float],
    *,
    peer: str | None = None,
    peer_runs: Sequence[float] | None = None,
    smaller_is_better: bool = False,
) -> Result:
    """The median of interleaved runs, and the median of their ratios to the peer's, pair by pair."""
    ratio = None
    if peer_runs is not None:
        pairs = zip(runs, peer_runs, strict=True)
        ratio = statistics.median(theirs / ours if smaller_is_better else ours / theirs for ours, theirs in pairs)
    return Result(case, metric, statistics.median(runs), unit, peer, ratio, list(runs), spread=(min(runs), max(runs)))


def show_results(reporter: Reporter, title: str, results: Sequence[Result], claims: Sequence[Claim] = ()) -> None:
    """Show results and claims as tables, and add them to `--json`."""
    rows = [(r.case, r.metric, _shown(r), "" if r.ratio is None else f"{r.ratio:.3g}") for r in results]
    reporter.table(title, ("case", "measure", "value", "ratio"), rows)
    values: dict[str, Any] = {"results": [asdict(r) for r in results]}
    if claims:
        judged = [(c.statement, c.expected, c.measured, c.verdict) for c in claims]
        reporter.table("claims", ("statement", "expected", "measured", "verdict"), judged)
        values["claims"] = [asdict(c) for c in claims]
    reporter.result(values)


def _shown(result: Result) -> str:
    if result.unit == "B":
        return format_quantity(result.value, "B")
    return f"{result.value:,.4g} {result.unit}".strip()


def result_place(name: str, out: Path | None, *, quick: bool = False) -> Path:
    """`out`, or where a script of `benchmarks/` writes: a quick run must not replace the committed result."""
    checkout = Path(__file__).resolve().parents[2]
    return out or checkout / ("build/bench" if quick else "benchmarks/results") / f"{name}.json"


def write_results(
    path: Path, suite: str, results: Sequence[Result], claims: Sequence[Claim] = (), **details: Any
) -> Path:
    """Write the file, with the environment it was measured in; details: further keys. Raises DataError.

    Warns on standard error if the measurement cannot be traced to a commit.
    """
    measured_in = environment()
    if (reason := blemish(measured_in)) is not None:
        print(f"warning: {path}: measured with {reason}: do not commit it as a result", file=sys.stderr)
    document = {
        "suite": suite,
        "environment": measured_in,
        "results": [asdict(result) for result in results],
        "claims": [asdict(claim) for claim in claims],
        **details,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}") from error
    return path
