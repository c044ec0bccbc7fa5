"""`nanochat bench collider`: time and memory of a training step at several shares of filtered tokens, against none.

Every width has its own process, in which the cases take turns, each round in another order; peak memory is that of a
process that trains with one case alone. The backward pass is everything from the gradient of the hidden states back to
the embedding, summed over the micro-batches. `gradient_ms` covers what grows with the tokens: forward, choice of
tokens, loss and backward. `step_ms` adds clipping, the optimizer and quantising the weights, which do not. Two more
cases: `keep all` chooses, but keeps every token; `known before` chooses before the forward pass, which then saves less
for the backward pass.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from nanochat_cli.bench.micro.architectures import HONEST_MEMORY
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import QuietReporter, Reporter
from nanochat_cli.report.result_file import Result, summarise

WIDTHS = 512, 768, 1024
SPARSITIES = 0.0, 0.2, 0.35, 0.4, 0.5
WARM_UP, ROUNDS = 1, 5
MICRO_BATCHES = 2
METRICS = "backward_ms", "gradient_ms", "step_ms"


class Setting(NamedTuple):
    """sparsity: share that is filtered; threshold: at 1e-9 every token is kept; known: before the forward pass."""

    name: str
    sparsity: float
    threshold: float = 1.0
    known: bool = False


def cases_of(sparsities: Sequence[float]) -> list[Setting]:
    """One case for each share, the first the peer of the others; then keep all, and the last share known before."""
    shares = [Setting(f"{share:.0%} filtered", share) for share in sparsities]
    last = sparsities[-1]
    return [
        *shares,
        Setting("keep all", last, threshold=1e-9),
        Setting(f"{last:.0%} filtered, known before", last, known=True),
    ]


def shape(width: int) -> Config:
    """Two layers of this width with the quickstart's vocabulary, and micro-batches of 2048 tokens."""
    overrides = [f"model.dim={width}", "model.n_layers=2", f"model.n_heads={width // 64}", "model.n_kv_heads=4"]
    overrides += [f"model.ffn_dim={width * 3}", "train.batch_size=8", "train.seq_len=256", "model.max_seq_len=256"]
    return resolve_config(["quickstart"], None, [*overrides, f"train.grad_accum={MICRO_BATCHES}"])


def measure_collider(
    reporter: Reporter,
    *,
    widths: Sequence[int] = WIDTHS,
    sparsities: Sequence[float] = SPARSITIES,
    rounds: int = ROUNDS,
) -> list[Result]:
    """Milliseconds of the backward pass and of the step, and peak bytes; ratio: unfiltered / filtered."""
    results = []
    cases = cases_of(sparsities)
    with reporter.progress("collider", len(widths) * (1 + len(cases)), "processes") as progress:
        for width in widths:
            times = _child({"width": width, "cases": cases, "rounds": rounds})
            progress.advance(1)
            peaks = []
            for case in cases:
                task = {"width": width, "cases": [case], "rounds": 1}
                peaks.append(_child(task, HONEST_MEMORY)["peak_bytes"])
                progress.advance(1)
            for number, case in enumerate(cases):
                name = f"width {width}, {case.name}"
                peer = None if number == 0 else "nothing filtered"
                for metric in METRICS:
                    runs, plain = times[metric][number], times[metric][0] if peer else None
                    results.append(
                        summarise(name, metric, "ms", runs, peer=peer, peer_runs=plain, smaller_is_better=True)
                    )
                ratio = peaks[0] / peaks[number] if peer else None
                results.append(Result(name, "peak_bytes", peaks[number], "B", peer, ratio, [peaks[number]]))
    return results


def _child(task: dict[str, Any], environment: dict[str, str] | None = None) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanochat_cli.bench.micro.collider", json.dumps(task)]
    ran = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **(environment or {})}
    )
    return json.loads(ran.stdout.splitlines()[-1])


def time_cases(config: Config, cases: Sequence[Setting], rounds: int) -> dict[str, Any]:
    """Milliseconds of every round for each case, taking turns; and the growth of the process's peak memory."""
    import torch

    from nanochat_cli.training.build import build_state
    from nanochat_cli.training.methods.collider import TokenFilter
    from nanochat_cli.training.next_token import next_token_loss
    from nanochat_cli.training.part import Setup
    from nanochat_cli.training.update import gradient, step

    before = peak_memory()
    torch.manual_seed(0)
    cpu, quiet = torch.device("cpu"), QuietReporter()
    shared = build_state(config, cpu, quiet, methods={})
    shared.skip_policy.spike_factor = math.inf
    sequences = config.train.batch_size * config.train.grad_accum
    tokens = torch.randint(config.model.vocab_size, (sequences, config.train.seq_len + 1))
    scores = torch.rand(tokens[:, 1:].shape)
    data: Any = SimpleNamespace(scores=lambda _: scores)
    states = []
    for case in cases:
        values: dict[str, Any] = {"enabled": True, "sparsity": case.sparsity, "threshold": case.threshold}
        if case.known:
            values["scores"] = Path("scores")
        filtered = config.model_copy(update={"collider": type(config.collider).model_validate(values)})
        setup = Setup(filtered, shared.model, shared.score, cpu, quiet, data)
        clock = _backward_clock(setup)
        states.append((replace(shared, parts=[TokenFilter(setup), clock]), clock))
    found: dict[str, Any] = {metric: [[] for _ in cases] for metric in METRICS}
    order = list(range(len(states)))
    for turn in range(WARM_UP + rounds):
        shared.progress.step = turn
        random.Random(turn).shuffle(order)  # so that no case always pays for what the same other one leaves in memory
        for number in order:
            state, clock = states[number]
            started = time.perf_counter()
            metrics = gradient(state, sequences, next_token_loss(state, tokens[:, :-1], tokens[:, 1:]))
            of_gradient = time.perf_counter() - started
            step(state, metrics)
            if turn >= WARM_UP:
                seconds = clock.seconds, of_gradient, time.perf_counter() - started
                for metric, value in zip(METRICS, seconds, strict=True):
                    found[metric][number].append(1e3 * value)
    return found | {"peak_bytes": peak_memory() - before}


def _backward_clock(setup: Any) -> Any:
    from torch import Tensor

    from nanochat_cli.training.part import MicroBatch, Part
    from nanochat_cli.training.progress import Progress

    class BackwardClock(Part):
        """Sums the time of a step's backward passes from the gradient of the hidden states on."""

        seconds = 0.0
        _began: float | None = None

        def begin(self, progress: Progress) -> None:
            self.seconds = 0.0

        def before_forward(self, micro: MicroBatch) -> None:
            self._stop()

        def after_forward(self, micro: MicroBatch) -> None:
            micro.hidden.register_hook(self._start)

        def end(self, *, failed: bool) -> None:
            self._stop()

        def _start(self, gradient: Tensor) -> None:
            self._began = time.perf_counter()

        def _stop(self) -> None:
            """The last micro-batch is over: the next one begins, or all are done."""
            if self._began is not None:
                self.seconds += time.perf_counter() - self._began
            self._began = None

    return BackwardClock(setup)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(time_cases(shape(asked["width"]), [Setting(*case) for case in asked["cases"]], asked["rounds"])))
