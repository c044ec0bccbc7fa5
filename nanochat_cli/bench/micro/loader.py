"""`nanochat bench loader`: how long training waits for batches, read ahead by worker processes or not.

Two sources (token shards, text tokenised on the fly), each without a step, which is the rate of the loader alone, and
with a step of `step_seconds`. The step sleeps: like a step on a GPU, it takes no core from the workers. The two ways
take turns in one process, over the same batches.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from nanochat_cli.config.schema import Config
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.loader import source_spec
from nanochat_cli.data.loader_sources import BatchSource, SourceSpec
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result, summarise

SYNC, ASYNC = "read in the trainer", "read ahead"
WARM_UP = 10

Measured = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """Every round takes `steps` steps of `step_seconds` each, and `raw_batches` batches without a step."""

    rounds: int
    steps: int
    raw_batches: int
    step_seconds: float = 0.12


FULL = Effort(rounds=3, steps=20, raw_batches=40)
QUICK = Effort(rounds=1, steps=8, raw_batches=12)


def measure_loader(folder: Path, config: Config, effort: Effort, reporter: Reporter) -> list[Result]:
    """Prepare `data.source` in `folder` and measure; batches have the shape of `[train]`."""
    prepare_dataset(config.data.source, folder, config, reporter)
    reader = ShardReader(folder)
    results: list[Result] = []
    for name, on_the_fly in (("shards", False), ("on the fly", True)):
        loader = config.loader.model_copy(update={"on_the_fly": on_the_fly})
        spec = source_spec(reader, config.model_copy(update={"loader": loader}), reporter)
        raw = _take_turns(spec, config, effort, _tokens_per_second)
        results += _results(f"{name}, no step", raw)
        busy = _take_turns(spec, config, effort, _with_step)
        results += _results(f"{name}, step of {effort.step_seconds * 1e3:.0f} ms", busy)
    return results


def _take_turns(
    spec: SourceSpec, config: Config, effort: Effort, measure: Callable[[Iterator[int], Effort], Measured]
) -> dict[str, list[Measured]]:
    measured: dict[str, list[Measured]] = {SYNC: [], ASYNC: []}
    for _ in range(effort.rounds):
        measured[SYNC].append(measure(_batches(spec.open()), effort))
        with AsyncLoader(spec, config.loader.workers, config.loader.prefetch) as loader:
            measured[ASYNC].append(measure(_batches(loader), effort))
    return measured


def _batches(source: BatchSource) -> Iterator[int]:
    """Reads one batch after the other; yields its number of tokens."""
    for index in count():
        inputs, _ = source.batch(index)
        yield inputs.size


def _tokens_per_second(batches: Iterator[int], effort: Effort) -> Measured:
    for _ in range(WARM_UP):  # workers start, and what they read ahead meanwhile is used up
        next(batches)
    started = time.perf_counter()
    tokens = sum(next(batches) for _ in range(effort.raw_batches))
    return {"tokens_per_second": tokens / (time.perf_counter() - started)}


def _with_step(batches: Iterator[int], effort: Effort) -> Measured:
    waits, fractions = [], []
    for number in range(WARM_UP + effort.steps):
        started = time.perf_counter()
        next(batches)
        waited = time.perf_counter() - started
        time.sleep(effort.step_seconds)
        if number >= WARM_UP:
            waits.append(waited * 1e3)
            fractions.append(1 - waited / (time.perf_counter() - started))
    return {"data_wait_ms": statistics.median(waits), "busy_fraction": statistics.mean(fractions)}


def _results(case: str, measured: dict[str, list[Measured]]) -> list[Result]:
    units = {"tokens_per_second": "tokens/s", "data_wait_ms": "ms", "busy_fraction": ""}
    results = []
    for metric in measured[SYNC][0]:
        sync, ahead = ([values[metric] for values in measured[way]] for way in (SYNC, ASYNC))
        unit = units[metric]
        results.append(summarise(f"{case}, {SYNC}", metric, unit, sync))
        smaller = metric == "data_wait_ms"
        results.append(
            summarise(f"{case}, {ASYNC}", metric, unit, ahead, peer=SYNC, peer_runs=sync, smaller_is_better=smaller)
        )
    return results
