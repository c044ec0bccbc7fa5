"""`nanochat bench collider`: time and memory of a training step at several shares of filtered tokens, against none.

Every width has a process of its own in which the shares take turns; peak memory is that of a process that trains with
one share alone. The backward pass is everything from the gradient of the hidden states back to the embedding. The step
is all of it: forward, choice of tokens, loss, backward, clipping, optimizer, and quantising the weights again. A
choice that is known before the forward pass (`known`) is one more case: it saves less for the backward pass.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanochat_cli.bench.architectures import HONEST_MEMORY
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.bench.result_file import Result, summarise
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import Reporter

WIDTHS = 512, 768, 1024
SPARSITIES = 0.0, 0.2, 0.35, 0.4, 0.5
WARM_UP, ROUNDS = 1, 5


def shape(width: int) -> Config:
    """Two layers of a width with the vocabulary of the quickstart, 2048 tokens a step."""
    overrides = [f"model.dim={width}", "model.n_layers=2", f"model.n_heads={width // 64}", "model.n_kv_heads=4"]
    overrides += [f"model.ffn_dim={width * 3}", "train.batch_size=8", "train.seq_len=256", "model.max_seq_len=256"]
    return resolve_config(["quickstart"], None, overrides)


def measure_collider(
    reporter: Reporter,
    *,
    widths: Sequence[int] = WIDTHS,
    sparsities: Sequence[float] = SPARSITIES,
    rounds: int = ROUNDS,
) -> list[Result]:
    """Milliseconds of the backward pass and of the step, and peak bytes; ratio: unfiltered / filtered."""
    results = []
    cases = [(share, False) for share in sparsities] + [(sparsities[-1], True)]
    with reporter.progress("collider", len(widths) * (1 + len(cases)), "processes") as progress:
        for width in widths:
            times = _child({"width": width, "cases": cases, "rounds": rounds})
            progress.advance(1)
            peaks = []
            for case in cases:
                peaks.append(_child({"width": width, "cases": [case], "rounds": 1})["peak_bytes"])
                progress.advance(1)
            for number, (share, known) in enumerate(cases):
                name = f"width {width}, {share:.0%} filtered{', known before' if known else ''}"
                peer = None if number == 0 else "nothing filtered"
                for metric in ("backward_ms", "step_ms"):
                    runs, plain = times[metric][number], times[metric][0] if peer else None
                    results.append(
                        summarise(name, metric, "ms", runs, peer=peer, peer_runs=plain, smaller_is_better=True)
                    )
                ratio = peaks[0] / peaks[number] if peer else None
                results.append(Result(name, "peak_bytes", peaks[number], "B", peer, ratio, [peaks[number]]))
    return results


def _child(task: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "nanochat_cli.bench.collider", json.dumps(task)]
    environment = {**os.environ, **HONEST_MEMORY}
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(ran.stdout.splitlines()[-1])


def time_cases(config: Config, cases: Sequence[tuple[float, bool]], rounds: int) -> dict[str, Any]:
    """Per case the milliseconds of every round, taking turns; and the growth of the process's peak memory."""
    import torch

    from nanochat_cli.model.transformer import Transformer
    from nanochat_cli.optim import build_optimizer
    from nanochat_cli.training.collider import TokenFilter

    before = peak_memory()
    torch.manual_seed(0)
    model = Transformer(config.model).train()
    model.use_forms()
    optimizers = build_optimizer(model, config.optim)
    tokens = torch.randint(config.model.vocab_size, (config.train.batch_size, config.train.seq_len + 1))
    scores = torch.rand(tokens[:, 1:].shape)
    steps, timed = [], _timed_step()
    for share, known in cases:
        values: dict[str, Any] = {"enabled": True, "sparsity": share}
        if known:
            values["scores"] = Path("scores")
        collider = type(config.collider).model_validate(values)
        step = timed(model, config.train, None, print, None, TokenFilter(collider, [m for _, m in model.linears()]))
        step.filtering = True
        steps.append((step, scores if known else None))
    found: dict[str, Any] = {"backward_ms": [[] for _ in cases], "step_ms": [[] for _ in cases]}
    for turn in range(WARM_UP + rounds):
        for number, (step, given) in enumerate(steps):
            started = time.perf_counter()
            step(tokens[:, :-1], tokens[:, 1:], optimizers.zero_grad, given)
            optimizers.clip_grad_norm(1.0)
            optimizers.step(turn, 1000)
            model.requantize()
            if turn >= WARM_UP:
                found["step_ms"][number].append(1e3 * (time.perf_counter() - started))
                found["backward_ms"][number].append(1e3 * step.backward_seconds)
    return found | {"peak_bytes": peak_memory() - before}


def _timed_step() -> type:
    from torch import Tensor

    from nanochat_cli.training.gradient_step import BatchLoss, GradientStep

    class Timed(GradientStep):
        """Knows how long the last backward pass took from the hidden states on."""

        backward_seconds = 0.0
        _began = 0.0

        def _hidden_states(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
            hidden, ahead = super()._hidden_states(inputs, targets)
            hidden.register_hook(self._begin)
            return hidden, ahead

        def _begin(self, gradient: Tensor) -> None:
            self._began = time.perf_counter()

        def _accumulate(self, inputs: Tensor, targets: Tensor, scores: Tensor | None) -> BatchLoss:
            found = super()._accumulate(inputs, targets, scores)
            self.backward_seconds = time.perf_counter() - self._began
            return found

    return Timed


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(time_cases(shape(asked["width"]), [tuple(case) for case in asked["cases"]], asked["rounds"])))
