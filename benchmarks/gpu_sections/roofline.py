"""The ceilings of the device, and how near our kernels come to them.

First a plain copy of memory and square products in bf16, fp8 (rows and whole tensors with a scale) and int8; then the
kernels that move memory, as a share of the copy; then packed products against cuBLAS (`products`); then, while time is
left, tiles of the products' kernels. Products of CPUs take smaller sizes: a test.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_sections.products import QUICK, SWEPT, TABLE, measure_table, sweep
from benchmarks.gpu_sections.task import NO_FP8, REPEATS, Task
from nanochat_cli.bench.micro.kernels import Device
from nanochat_cli.bench.micro.kernels_cpu import CPU
from nanochat_cli.bench.micro.kernels_cuda import CUDA
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.result_file import summarise
from nanochat_kernels import (
    fp8_matmul,
    int8_matmul,
    quantize_activations,
    rmsnorm_quantize,
    swiglu_quantize,
    ternarize,
    ternarize_packed,
    unpack,
)
from nanochat_kernels.linear_products import FP8
from nanochat_kernels.operations import cross_entropy_gradient

SIZE, TOKENS, WIDTH, HIDDEN, VOCABULARY = 8192, 65536, 768, 2816, 32768
LOSS_CHUNKS = 8
COPIES = 8
"""Calls of a kernel in one graph; so many weights are larger than the cache of a GPU."""
COPY_BYTES = 2**30
LEAST_SWEEP_SECONDS = 10.0
COPY = "copy of memory"


def run(task: Task) -> None:
    size, copied = (256, 2**20) if task.quick else (SIZE, COPY_BYTES)
    rate: list[float] = []
    with task.attempt(COPY):
        rate = copy_rates(task, copied)
        task.add([summarise(task.device.type, COPY, "B/s", rate)])
    square(task, size)
    if rate:
        moving(task, statistics.median(rate), *((256, 128, 256) if task.quick else (TOKENS, WIDTH, HIDDEN)))
    with task.attempt("packed products"):
        packed_products(task)


def copy_rates(task: Task, n_bytes: int) -> list[float]:
    """Bytes read and written per second."""
    source = torch.ones(n_bytes, dtype=torch.uint8, device=task.device)
    target = torch.empty_like(source)
    return [2 * n_bytes / seconds for seconds in task.seconds(lambda: target.copy_(source))]


def square(task: Task, n: int) -> None:
    """n × n × n products of random numbers, operations per second, against bf16."""
    generator = torch.Generator(task.device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=task.device) for _ in range(2))
    bf16_a, bf16_b = a.to(torch.bfloat16), b.to(torch.bfloat16)
    fp8_a, fp8_b = a.to(FP8), b.to(FP8)
    int8_a, int8_b = ((t * 40).round().clamp(-127, 127).to(torch.int8) for t in (a, b))
    rows, columns, one = a.new_ones(n, 1), a.new_ones(1, n), a.new_ones(())
    ours: dict[str, Any] = {"backend": "triton"} if task.cuda else {}
    private: Any = torch  # both are public only in later versions
    scaled = private._scaled_mm

    def scaled_rows(fast: bool) -> Callable[[], Tensor]:
        return lambda: scaled(fp8_a, fp8_b.T, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=fast)

    calls: dict[str, Callable[[], Tensor]] = {
        "torch.mm bf16": lambda: torch.mm(bf16_a, bf16_b.T),
        "torch._scaled_mm fp8, a scale per row": scaled_rows(fast=False),
        "torch._scaled_mm fp8, a scale per row, fast sums": scaled_rows(fast=True),
        "torch._scaled_mm fp8, one scale": lambda: scaled(fp8_a, fp8_b.T, one, one, out_dtype=torch.bfloat16),
        "torch._int_mm": lambda: private._int_mm(int8_a, int8_b.T),
        "int8_matmul, ours": lambda: int8_matmul(int8_a, int8_b, rows, rows, torch.bfloat16, **ours),
        "fp8_matmul, ours": lambda: fp8_matmul(fp8_a, fp8_b, rows, rows, torch.bfloat16, **ours),
    }
    peer, bf16 = "torch.mm bf16", None
    for name, call in calls.items():
        if "fp8" in name and not task.has_fp8:
            task.leave_out(name, NO_FP8)
            continue
        with task.attempt(name):
            rates = [2 * n**3 / seconds for seconds in task.seconds(call)]
            than: dict[str, Any] = {} if bf16 is None else {"peer": peer, "peer_runs": bf16}
            task.add([summarise(f"{n}³", name, "op/s", rates, **than)])
            bf16 = rates if name == peer else bf16


def moving(task: Task, roof: float, tokens: int, width: int, hidden: int) -> None:
    """Bytes that must be read once and written once, per second, as a share of the copy's.

    As CUDA graphs: launched one by one, the smaller ones wait for the host. Weights take turns, so that none is in the
    cache. The loss reads its logits twice; the second time from the cache, if it comes near the copy.
    """
    generator = torch.Generator(task.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=task.device)

    x, norm = draw(tokens, width).to(torch.bfloat16), draw(width)
    gate, up = (draw(tokens, hidden).to(torch.bfloat16) for _ in range(2))
    latents = [draw(hidden, hidden) for _ in range(COPIES)]
    packed = [ternarize_packed(latent) for latent in latents]
    rows = tokens // LOSS_CHUNKS
    logits, factor = draw(rows, VOCABULARY).to(torch.bfloat16), torch.ones(rows, device=task.device)
    targets = torch.arange(rows, device=task.device)
    n, wide, weights = x.numel(), gate.numel(), latents[0].numel()
    calls: dict[str, tuple[Callable[[int], object], float]] = {
        f"quantize_activations {tokens}×{width}": (lambda _: quantize_activations(x), 3 * n),
        f"rmsnorm_quantize {tokens}×{width}": (lambda _: rmsnorm_quantize(x, norm, 1e-5), 3 * n),
        f"swiglu_quantize {tokens}×{hidden}": (lambda _: swiglu_quantize(gate, up), 5 * wide),
        f"cross_entropy_gradient {rows}×{VOCABULARY}": (
            lambda _: cross_entropy_gradient(logits, targets, factor),
            4 * logits.numel(),
        ),
        f"ternarize {hidden}×{hidden}": (lambda i: ternarize(latents[i]), 5 * weights),
        f"ternarize_packed {hidden}×{hidden}": (lambda i: ternarize_packed(latents[i]), 4.25 * weights),
        f"unpack {hidden}×{hidden}": (lambda i: unpack(packed[i]), 1.25 * weights),
    }
    device = _device(task)
    for name, (call, n_bytes) in calls.items():
        with task.attempt(name):
            run = device.prepare([partial(call, i) for i in range(COPIES)])
            rates = [n_bytes / run() for _ in range(2 if task.quick else REPEATS)]
            task.add([summarise(name, "rate", "B/s", rates, peer=COPY, peer_runs=[roof] * len(rates))])


def packed_products(task: Task) -> None:
    """Each product on its own, so that those measured are written before the next begins; then tiles."""
    device = _device(task)
    for product in QUICK if task.quick else TABLE:
        if task.left() < 0:
            task.leave_out(str(product), "no time was left")
            continue
        with task.attempt(str(product)):
            results, claims = measure_table(device, QuietReporter(), [product], 1 if task.quick else 5)
            task.add([result for result in results if result.case != device.name], claims)  # ceilings are above
    if not task.cuda or task.left() < LEAST_SWEEP_SECONDS:
        task.leave_out("tiles of the products' kernels", "no time was left" if task.cuda else "only on CUDA")
        return
    for number, product in enumerate(SWEPT):
        with task.attempt(f"tiles, {product}"):
            task.add(sweep(device, QuietReporter(), task.left() / (len(SWEPT) - number), [product]))


def _device(task: Task) -> Device:
    device = CUDA() if task.cuda else CPU()
    if task.quick:
        device.rotation_bytes = 1
    return device
