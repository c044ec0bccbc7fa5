"""Whole training steps on a GPU: the float twin, and ternary models with exact and low-precision backward passes.

CONTENDERS is the table of what is compared, as overrides of one configuration. They take turns, a few steps each, on
random tokens; utilisation is against the rate of a large bf16 product, measured in the same process.
"""

import gc
import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.gpu_sections.task import Task
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, summarise
from nanochat_cli.training.build import build_state
from nanochat_cli.training.compilation import compile_blocks
from nanochat_cli.training.flops import measured_peak, model_flops_per_token
from nanochat_cli.training.next_token import train_step

TWIN = "float twin"
CONTENDERS: Mapping[str, Sequence[str]] = {
    TWIN: ["model.quant.enabled=false"],
    "ternary": ["train.forward=float"],
    "ternary, int8 forward and backward": ["train.forward=int8", "train.backward=int8"],
    "ternary, int8 forward, fp8 dX": ["train.forward=int8", "train.grad_input=fp8"],
    "ternary, int8 forward": ["train.forward=int8"],
}
"""The most important first: the last are left out when time or memory is short."""
PRESETS = ("nano-125m", "llama-cpp")
SHARED = ("train.loss_chunk=8192", "train.seq_len=2048", "train.grad_accum=2")
SIZES: Mapping[str, Sequence[str]] = {
    "training-125m": [*SHARED, "train.batch_size=16"],
    "training-1b": [
        *SHARED,
        "train.batch_size=8",
        "train.gradient_checkpointing=true",
        *("model.dim=2048", "model.n_layers=20", "model.n_heads=16", "model.n_kv_heads=4", "model.ffn_dim=5632"),
    ],
}
TINY = (
    *("model.dim=128", "model.n_heads=2", "model.n_kv_heads=1", "model.ffn_dim=128", "model.n_layers=1"),
    *("model.vocab_size=300", "model.max_seq_len=16", "train.batch_size=2", "train.seq_len=16"),
)
WARM_UP_STEPS, ROUNDS, STEPS = 3, 4, 5
PROFILED_KERNELS = 40
RECOMPILES = 64
"""All contenders compile one function, a block's; past torch's own limit of eight, later ones would run eagerly."""
BUILDING = 0.75
"""Share of the time after which no further contender is built."""
AT_MOST = {"training-1b": 4}
"""Contenders whose weights and optimizer states fit into 80 GB together."""


class Contender:
    """A model that can be timed over whole training steps; compiled, and in bfloat16, on CUDA.

    peak_memory: bytes of parameters, optimizer state, activations and workspace, in the warm-up; 0 on a CPU.
    """

    def __init__(self, config: Config, device: torch.device, warm_up: int = WARM_UP_STEPS) -> None:
        torch.manual_seed(0)
        self.cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated(device) if self.cuda else 0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)
        self.state = build_state(config, device, PlainReporter(), methods={})
        self.state.skip_policy.spike_factor = math.inf
        if self.cuda:
            torch._dynamo.config.recompile_limit = RECOMPILES
            compile_blocks(self.state.model)
        self.config, self.device = config, device
        generator = torch.Generator().manual_seed(0)
        shape = (config.train.batch_size * config.train.grad_accum, config.train.seq_len + 1)
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


def configured(size: str, name: str, *, tiny: bool = False) -> Config:
    """The configuration of a contender. tiny: a few thousand weights, for a test."""
    overrides = [*SIZES[size], *(TINY if tiny else ()), *CONTENDERS[name]]
    return resolve_config(PRESETS, None, overrides)


def run(task: Task) -> None:
    started, whole = time.monotonic(), task.left()
    contenders: dict[str, Contender] = {}
    for name in CONTENDERS:
        if len(contenders) >= AT_MOST.get(task.section, len(CONTENDERS)):
            task.leave_out(name, "no memory for one more")
            continue
        if contenders and time.monotonic() - started > BUILDING * whole:
            task.leave_out(name, "no time was left to compile it")
            continue
        with task.attempt(name):
            contenders[name] = Contender(configured(task.section, name, tiny=task.quick), task.device)
            print(f"{name}: ready after {time.monotonic() - started:.0f} s", flush=True)
        gc.collect()
        if task.cuda:
            torch.cuda.empty_cache()
    if contenders:
        with task.attempt("rounds"):
            compare(task, contenders)
        if task.cuda:
            with task.attempt("profiles"):
                task.details["profiles"] = {name: profile(contender) for name, contender in contenders.items()}


def compare(task: Task, contenders: Mapping[str, Contender]) -> None:
    """Rounds of steps, all contenders in turn; after each, the file has what is known."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    dtype = torch.bfloat16 if task.cuda else torch.float32
    peak = measured_peak(task.device, dtype, sizes=(256,) if task.quick else None)
    for turn in range(1 if task.quick else ROUNDS):
        if turn and task.left() < 0:
            task.leave_out(f"rounds from {turn + 1} on", "no time was left")
            break
        for name, contender in contenders.items():
            rates[name].append(contender.tokens_per_second(1 if task.quick else STEPS))
        task.results.clear()
        task.add(measured(contenders, rates, peak))


def profile(contender: Contender) -> list[dict[str, float | str]]:
    """The kernels of one training step that take the most time of the device, and what is left of the step's own."""
    kind = torch.profiler.ProfilerActivity.CUDA if contender.cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profiler:
        rate = contender.tokens_per_second(1)
    kernels = list(profiler.key_averages())
    rows: list[dict[str, float | str]] = []
    for event in kernels:
        microseconds = event.self_device_time_total if contender.cuda else event.self_cpu_time_total
        rows.append({"kernel": event.key[:120], "calls": event.count, "seconds": microseconds / 1e6})
    rows.sort(key=lambda row: -float(row["seconds"]))
    total = {"kernel": "all kernels", "calls": sum(event.count for event in kernels)}
    step = {"kernel": "the step", "calls": 1, "seconds": contender.tokens[:, 1:].numel() / rate}
    return [step, {**total, "seconds": math.fsum(float(row["seconds"]) for row in rows)}, *rows[:PROFILED_KERNELS]]


def measured(contenders: Mapping[str, Contender], rates: Mapping[str, Sequence[float]], peak: float) -> list[Result]:
    """Rate, utilisation and memory of each contender; those of the twin are the peer's."""
    results = []
    twin = contenders.get(TWIN)
    for name, contender in contenders.items():
        config, tokens = contender.config, contender.tokens[:, 1:].numel()
        case = f"{name}, {tokens} tokens a step"
        than = name != TWIN and twin is not None
        peer, peer_rates = (TWIN, rates[TWIN]) if than else (None, None)
        results.append(summarise(case, "training rate", "tokens/s", rates[name], peer=peer, peer_runs=peer_rates))
        flops = model_flops_per_token(config.model, config.train.seq_len)
        shares = [rate * flops / peak for rate in rates[name]]
        results.append(summarise(case, "utilisation of the measured matmul peak", "share", shares))
        if contender.peak_memory:
            memory = [float(contender.peak_memory)]
            twins = [float(twin.peak_memory)] if than and twin is not None else None
            results.append(
                summarise(case, "peak memory", "B", memory, peer=peer, peer_runs=twins, smaller_is_better=True)
            )
        micro_batch = contender.state.progress.micro_batch
        if micro_batch != config.train.batch_size:  # it was halved for lack of memory
            results.append(Result(case, "micro-batch that fitted", float(micro_batch), "sequences"))
    results.append(Result(f"{next(iter(contenders.values())).device.type}", "matmul peak", peak, "op/s"))
    return results
