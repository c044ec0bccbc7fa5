"""From the folder of a run to its record: the measures in `bench.matched.run_record.MEASURES`, and the curves.

Reads `metrics.jsonl` and the outcome that the run's process reported. Times are medians over the steps after the first
tenth, in which memory is allocated, kernels are compiled and caches fill. Only the main loss on held-out documents
counts; auxiliary losses are left out everywhere.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.run_record import DIVERGED, FINISHED, MEASURES, Point, RunRecord
from nanochat_cli.report.environment import read_environment
from nanochat_cli.report.metrics_log import FILE_NAME, read_metrics, series

MAX_POINTS = 500
WARM_UP_SHARE = 0.1


@dataclass(frozen=True)
class RunOutcome:
    """How a run's process ended, as reported by itself or by its parent.

    peak_memory_bytes: on a GPU the peak of torch's allocations; on a CPU the growth of the process while it trained.
    """

    status: str
    reason: str | None = None
    parameters: int | None = None
    optimizer_state_bytes: int | None = None
    peak_memory_bytes: int | None = None
    gguf_bytes: int | None = None
    gpu_utilisation: float | None = None
    adamw_state_bytes: int | None = None


def read_run(folder: Path, run: str, config: str, seed: int, outcome: RunOutcome) -> RunRecord:
    """The record of the run in `folder / run`, without curves if it never began.

    A run whose held-out loss is not finite has diverged, whatever its process reported.
    """
    metrics = read_metrics(folder / run) if (folder / run / FILE_NAME).is_file() else []
    steps = [record for record in metrics if "loss/main" in record]
    status, reason = outcome.status, outcome.reason
    ends = [record for record in metrics if "final/bits_per_byte" in record]
    if status == FINISHED and (not ends or ends[-1]["final/bits_per_byte"] is None):
        status, reason = DIVERGED, "the held-out loss at the end is not finite"
    measures: dict[str, float | None] = dict.fromkeys(MEASURES)
    if steps:
        measures |= _of_steps(steps)
        measures["train_seconds"] = metrics[-1]["seconds"]
    if status == FINISHED:
        measures |= {"bits_per_byte": ends[-1]["final/bits_per_byte"], "loss": ends[-1]["final/loss"]}
    for name in ("optimizer_state_bytes", "adamw_state_bytes", "peak_memory_bytes", "gguf_bytes", "gpu_utilisation"):
        measures[name] = getattr(outcome, name)
    return RunRecord(
        config=config,
        seed=seed,
        status=status,
        reason=reason,
        run=run,
        parameters=outcome.parameters,
        train=_curve(steps),
        evaluations=_evaluations(metrics),
        measures=measures,
        environment=read_environment(folder / run) or {},
    )


def relate(runs: Sequence[RunRecord], baseline: str) -> list[RunRecord]:
    """The runs with `tokens_to_baseline` and `seconds_to_baseline`, relative to the baseline with the same seed."""
    targets = {
        run.seed: run.evaluations[-1].bits_per_byte
        for run in runs
        if run.config == baseline and run.status == FINISHED and run.evaluations
    }
    related = []
    for run in runs:
        tokens = seconds = None
        if run.status == FINISHED and run.seed in targets:
            tokens, seconds = first_reached(run.evaluations, targets[run.seed]) or (None, None)
        measures = run.measures | {"tokens_to_baseline": tokens, "seconds_to_baseline": seconds}
        related.append(replace(run, measures=measures))
    return related


def first_reached(points: Sequence[Point], target: float) -> tuple[float, float] | None:
    """Tokens and seconds at which the bits per byte first reach `target`, interpolated linearly between evaluations.

    None if they never do. If already the first evaluation is below it, the tokens and seconds of that one.
    """
    if points and points[0].bits_per_byte <= target:
        return float(points[0].tokens), points[0].seconds
    for before, after in pairwise(points):
        if after.bits_per_byte <= target:
            share = (before.bits_per_byte - target) / (before.bits_per_byte - after.bits_per_byte)
            tokens = before.tokens + share * (after.tokens - before.tokens)
            return tokens, before.seconds + share * (after.seconds - before.seconds)
    return None


def _of_steps(steps: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    last = steps[-1]["step"]
    warm = [record for record in steps if record["step"] <= WARM_UP_SHARE * last]
    steady = [record for record in steps if record["step"] > WARM_UP_SHARE * last]
    start = {"tokens": 0, "seconds": 0.0} if not warm else warm[-1]
    seconds = steady[-1]["seconds"] - start["seconds"]
    waits, lengths = (_column(steady, f"throughput/{name}_ms") for name in ("data_wait", "step"))
    return {
        "tokens_per_second": (steady[-1]["tokens"] - start["tokens"]) / seconds if seconds > 0 else None,
        "step_ms": _median(lengths),
        "forward_ms": _median(_column(steady, "time/forward_ms")),
        "backward_ms": _median(_column(steady, "time/backward_ms")),
        "optimizer_ms": _median(_column(steady, "time/optimizer_ms")),
        "data_wait_ms": _median(waits),
        "busy_fraction": 1 - sum(waits) / sum(lengths) if lengths else None,
        "kept_fraction": _median(_column(steady, "collider/kept_fraction")),
        "gradient_norm": _median(_column(steady, "training/grad_norm")),
        "steps": last,
        "skipped": steps[-1]["training/skipped"],
    }


def _column(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _evaluations(metrics: Sequence[dict[str, Any]]) -> list[Point]:
    return [
        Point(r["step"], r["tokens"], r["seconds"], r["eval/bits_per_byte"], r["eval/loss"])
        for r in metrics
        if r.get("eval/bits_per_byte") is not None and r.get("eval/loss") is not None
    ]


def _curve(steps: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """At most MAX_POINTS evenly spaced steps with a finite loss, the last one among them."""
    finite = [record for record in steps if record["loss/main"] is not None]
    stride = -(-len(finite) // MAX_POINTS) if finite else 1
    thinned = finite[::-1][::stride][::-1]
    names = {"step": "step", "tokens": "tokens", "seconds": "seconds", "loss": "loss/main"}
    return {name: series(thinned, "step", key)[1] for name, key in names.items()}
