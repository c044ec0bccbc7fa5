"""Model FLOPs per token, and the matmul peak of this machine that utilisation is measured against.

Knows the shapes of the configuration and a clock. "Model" FLOPs are what the mathematics needs (arXiv:2204.02311,
appendix B), whatever a kernel really does: recomputation under activation checkpointing, quantising and masked halves
of attention count for nothing. No data sheet enters: the peak is a dense matmul timed here, in this process.
"""

import time
from typing import TYPE_CHECKING

from nanochat_cli.config.schema import Config, ModelConfig

if TYPE_CHECKING:
    import torch

_CPU_SIZES = (1024, 2048)
_CUDA_SIZES = (8192,)
_CPU_REPEATS = 4
_CUDA_REPEATS = 20

_peaks: dict[tuple[str, "torch.dtype", int], float] = {}


def model_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward for one token of a sequence of `seq_len` tokens (a multiply-add is 2).

    6 × N for the matrices of the blocks that a token goes through, router and head (2 forward, 2 for the gradient of
    the input, 2 for that of the weight), plus `mixing_flops`. The embedding lookup, norms, activations, the mixing of
    streams and the optimizer are not counted; a tied head is.
    """
    counts = config.count_parameters()
    matrices = counts.matrices - counts.inactive + counts.router + config.vocab_size * config.dim
    return 6 * matrices + config.mixing_flops(seq_len)


def training_flops_per_token(config: Config, kept: float = 1.0) -> float:
    """FLOPs of a training step for one token: those of the model, and of multi-token prediction.

    kept: share of the tokens in the backward pass, of token filtering. The forward pass, a third of the work, is that
    of every token, but the logits of tokens further ahead are those of kept ones. What a reference model computes for
    scores is not counted, and a fading weight of multi-token prediction counts as if it stayed.
    """
    model, seq_len = config.model, config.train.seq_len
    modules, logits = _ahead_per_token(config) if config.mtp.enabled else (0.0, 0.0)
    with_forward = (model_flops_per_token(model, seq_len) + modules) * (1 + 2 * kept) / 3
    return with_forward + logits * kept


def _ahead_per_token(config: Config) -> tuple[float, float]:
    """FLOPs of multi-token prediction, forward and backward: its modules, and its products with the unembedding."""
    model, mtp = config.model, config.mtp
    logits = 6.0 * model.vocab_size * model.dim / mtp.every
    if mtp.kind == "shared":
        return 0.0, mtp.n_tokens * logits
    if mtp.kind == "heads":
        return mtp.n_tokens * 6.0 * model.dim**2, mtp.n_tokens * logits
    from nanochat_cli.model.mtp import block_config

    block = model_flops_per_token(block_config(model), config.train.seq_len) - 6.0 * model.vocab_size * model.dim
    return 6.0 * 2 * model.dim**2 + block, logits


def measured_peak(device: "torch.device", dtype: "torch.dtype", *, sizes: tuple[int, ...] | None = None) -> float:
    """FLOP/s of the best dense n × n × n matmul on `device`, measured once per process, device, dtype and thread count.

    CPU: best of a few repetitions of each size (about a second), since anything slower is disturbance. CUDA: mean of a
    burst after a warm-up, since a burst is what training sustains.
    """
    import torch

    key = (str(device), dtype, torch.get_num_threads())
    if key not in _peaks:
        if device.type == "cuda":
            _peaks[key] = max(_cuda_matmul_rate(device, dtype, n) for n in sizes or _CUDA_SIZES)
        else:
            _peaks[key] = max(_cpu_matmul_rate(device, dtype, n) for n in sizes or _CPU_SIZES)
    return _peaks[key]


def _cpu_matmul_rate(device: "torch.device", dtype: "torch.dtype", n: int) -> float:
    import torch

    left, right, out = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(3))
    torch.mm(left, right, out=out)
    seconds = []
    for _ in range(_CPU_REPEATS):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def _cuda_matmul_rate(device: "torch.device", dtype: "torch.dtype", n: int) -> float:
    import torch

    # Random operands: a GPU clocks higher on constant ones, which no training step has.
    generator = torch.Generator(device=device).manual_seed(0)
    left, right = (torch.randn(n, n, device=device, dtype=dtype, generator=generator) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    for _ in range(_CUDA_REPEATS):
        torch.mm(left, right, out=out)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_CUDA_REPEATS):
        torch.mm(left, right, out=out)
    torch.cuda.synchronize(device)
    return 2 * n**3 * _CUDA_REPEATS / (time.perf_counter() - start)
