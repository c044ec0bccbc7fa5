"""`nanochat bench architectures`: time and memory of a training step, every architecture against the plain residual.

Each variant trains in a separate process, a few compiled steps on random tokens, and the variants take turns. Peak
memory is the growth of the process since before the model was built.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from nanochat_cli.bench.micro.variants import VARIANTS
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import PlainReporter, Reporter
from nanochat_cli.report.result_file import Result, summarise

WARM_UP, STEPS = 3, 10
HONEST_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Makes glibc return freed memory, so that the peak counts only what is held."""


def measure_architectures(
    preset: str, overrides: Sequence[str], reporter: Reporter, *, rounds: int, variants: Sequence[str] | None = None
) -> list[Result]:
    """Milliseconds per step and peak bytes of each variant; ratios are plain / variant."""
    chosen = list(variants or VARIANTS)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in chosen}
    with reporter.progress("architectures", rounds * len(chosen), "runs") as progress:
        for _ in range(rounds):
            for variant in chosen:
                runs[variant].append(_in_child(preset, [*VARIANTS[variant], *overrides]))
                progress.advance(1)
    results = []
    for variant, found in runs.items():
        for metric, unit in (("step_ms", "ms"), ("peak_bytes", "B")):
            values = [run[metric] for run in found]
            plain = [run[metric] for run in runs["plain"]] if variant != "plain" and "plain" in runs else None
            peer = None if plain is None else "plain"
            results.append(summarise(variant, metric, unit, values, peer=peer, peer_runs=plain, smaller_is_better=True))
    return results


def _in_child(preset: str, overrides: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanochat_cli.bench.micro.architectures", preset, *overrides]
    finished = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **HONEST_MEMORY}
    )
    return json.loads(finished.stdout.splitlines()[-1])


def time_steps(config: Config, *, compiled: bool = True, steps: int = STEPS) -> dict[str, float]:
    """Median milliseconds of a step, and the growth of this process's peak memory in bytes."""
    import torch

    from nanochat_cli.training.build import build_state
    from nanochat_cli.training.compilation import compile_blocks
    from nanochat_cli.training.cpp_compiler import find_compiler
    from nanochat_cli.training.next_token import train_step

    before = peak_memory()
    torch.manual_seed(0)
    state = build_state(config, torch.device("cpu"), PlainReporter())
    if compiled and find_compiler().path is not None:
        compile_blocks(state.model)
    tokens = torch.randint(config.model.vocab_size, (config.train.batch_size, config.train.seq_len + 1))
    seconds = []
    for _ in range(WARM_UP + steps):
        started = time.perf_counter()
        train_step(state, tokens[:, :-1], tokens[:, 1:])
        state.progress.step += 1
        seconds.append(time.perf_counter() - started)
    return {"step_ms": 1e3 * statistics.median(seconds[WARM_UP:]), "peak_bytes": peak_memory() - before}


if __name__ == "__main__":
    print(json.dumps(time_steps(resolve_config([sys.argv[1]], None, sys.argv[2:]))))
