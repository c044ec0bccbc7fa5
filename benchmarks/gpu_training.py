"""Training on a GPU in three alternating forms (a section of `benchmarks/gpu.py`).

`float linears`: the twin without quantisation. `float form`: the ternary product as exact bfloat16 codes.
`int8 form`: int8 tensor cores forward. Whole steps of nano-125m and of a shape of one billion parameters are timed;
then nano-125m is trained for some hundred steps on bytes of the standard library, and its losses are compared.
"""

import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, summarise
from nanochat_cli.training.build import build_state
from nanochat_cli.training.compilation import compile_blocks
from nanochat_cli.training.flops import measured_peak, model_flops_per_token
from nanochat_cli.training.next_token import train_step

Kind = Literal["float linears", "float form", "int8 form"]
KINDS: tuple[Kind, ...] = ("float linears", "float form", "int8 form")
PRESET = "nano-125m"
BILLION = {"dim": 2048, "n_layers": 20, "n_heads": 16, "n_kv_heads": 4, "ffn_dim": 5632}
"""Overrides of nano-125m that make 1.0 billion parameters."""
WARM_UP_STEPS = 5
LAST_LOSSES = 20
"""Steps whose mean loss is compared at the end of a run."""


class Contender:
    """A model that can be timed over whole training steps; compiled, and in bfloat16 on CUDA.

    peak_memory: bytes of parameters, optimizer state, activations and workspace, in the warm-up; 0 on a CPU.
    """

    def __init__(self, config: Config, kind: Kind, device: torch.device, warm_up: int = WARM_UP_STEPS) -> None:
        torch.manual_seed(0)
        self.cuda = device.type == "cuda"
        quant = config.model.quant.model_copy(update={"enabled": kind != "float linears"})
        changes = {
            "model": config.model.model_copy(update={"quant": quant}),
            "train": config.train.model_copy(update={"forward": "int8" if kind == "int8 form" else "float"}),
        }
        before = torch.cuda.memory_allocated(device) if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.state = build_state(config.model_copy(update=changes), device, PlainReporter(), methods={})
        self.state.skip_policy.spike_factor = math.inf
        if self.cuda:
            compile_blocks(self.state.model)
        self.config, self.device = config, device
        generator = torch.Generator().manual_seed(0)
        shape = (config.train.batch_size, config.train.seq_len + 1)
        self.tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator).to(device)
        self.tokens_per_second(warm_up)
        self.peak_memory = torch.cuda.max_memory_allocated(device) - before if self.cuda else 0

    def step(self, tokens: Tensor, step: int, total_steps: int) -> float:
        """Forward, backward, clip, update and requantisation; the loss in nats."""
        self.state.progress.step, self.state.progress.total_steps = step, total_steps
        return train_step(self.state, tokens[:, :-1], tokens[:, 1:])["loss/main"]

    def tokens_per_second(self, steps: int) -> float:
        """The rate over `steps` steps, always the second step of a run, so that nothing diverges."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            self.step(self.tokens, 1, self.config.train.total_steps)
        self._wait()
        return steps * self.tokens[:, 1:].numel() / (time.perf_counter() - started)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def billion(config: Config) -> Config:
    """nano-125m's settings around a model of one billion parameters."""
    model = config.model.model_copy(update=BILLION)
    return config.model_copy(update={"model": model, "train": config.train.model_copy(update={"batch_size": 4})})


def measure_training(name: str, config: Config, device: torch.device, rounds: int, steps: int) -> list[Result]:
    """Rounds of `steps` training steps of all three forms, alternating."""
    contenders = {kind: Contender(config, kind, device) for kind in KINDS}
    rates: dict[Kind, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(rounds):
        for kind, contender in contenders.items():
            rates[kind].append(contender.tokens_per_second(steps))
        now = ", ".join(f"{kind} {rates[kind][-1]:,.0f}" for kind in KINDS)
        print(f"{name}, round {turn + 1}/{rounds}: {now} tokens/s", flush=True)
    flops = model_flops_per_token(config.model, config.train.seq_len)
    peak = measured_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    case = f"{name}, {config.train.batch_size} × {config.train.seq_len} tokens"
    twin = KINDS[0]
    results = [summarise(f"{case}: {twin}", "training rate", "tokens/s", rates[twin])]
    for kind in KINDS[1:]:
        memory, twins = [float(contenders[which].peak_memory) for which in (kind, twin)]
        results += [
            summarise(f"{case}: {kind}", "training rate", "tokens/s", rates[kind], peer=twin, peer_runs=rates[twin]),
            summarise(
                f"{case}: {kind}", "utilisation of the matmul peak", "share", [r * flops / peak for r in rates[kind]]
            ),
        ]
        if memory:
            results.append(
                summarise(
                    f"{case}: {kind}",
                    "peak memory",
                    "B",
                    [memory],
                    peer=twin,
                    peer_runs=[twins],
                    smaller_is_better=True,
                )
            )
    return results


def train_forms(config: Config, device: torch.device, steps: int) -> tuple[list[Result], dict[str, list[float]]]:
    """Train each form from the same start on the same bytes. Returns the means of the last losses, and every loss."""
    batches = byte_batches(config, steps).to(device)
    curves: dict[str, list[float]] = {}
    for kind in KINDS:
        contender = Contender(config, kind, device, warm_up=0)
        curves[kind] = [contender.step(batch, step, steps) for step, batch in enumerate(batches)]
        print(f"{kind}: loss {curves[kind][0]:.4f} → {_end(curves[kind]):.4f}", flush=True)
    case = f"{PRESET}, {steps} steps on bytes of the standard library"
    twin = KINDS[0]
    results = [
        summarise(
            f"{case}: {kind}",
            f"mean loss of the last {LAST_LOSSES} steps",
            "nats",
            [_end(curves[kind])],
            peer=None if kind == twin else twin,
            peer_runs=None if kind == twin else [_end(curves[twin])],
            smaller_is_better=True,
        )
        for kind in KINDS
    ]
    return results, curves


def _end(losses: list[float]) -> float:
    return statistics.mean(losses[-LAST_LOSSES:])


def byte_batches(config: Config, steps: int) -> Tensor:
    """Bytes of the standard library's sources as tokens: int64 [steps, B, T + 1], repeated if there are too few."""
    shape = (steps, config.train.batch_size, config.train.seq_len + 1)
    needed = shape[0] * shape[1] * shape[2]
    text = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= needed:
            break
    data = torch.frombuffer(text, dtype=torch.uint8).to(torch.int64)
    return data.repeat(-(-needed // len(data)))[:needed].reshape(shape)
