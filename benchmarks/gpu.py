"""What only a CUDA machine can tell: whether the kernels' references agree with the CPU, and how fast training is.

    python benchmarks/gpu.py [--rounds 5] [--steps 10] [--out benchmarks/results/gpu.json]

First the reference operations, bit for bit against the CPU. Then whole training steps of nano-125m in bfloat16 with
compiled blocks, the ternary model and its float twin in turn: tokens per second and their ratio, utilisation against
the bfloat16 matmul peak measured in the same process, and peak memory. Exit code 2 without CUDA, 4 when a check fails.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from nanochat_cli.bench.result_file import Result, summarise, write_results
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, NanochatError, ValidationFailure
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.training.compilation import compile_blocks
from nanochat_cli.training.flops import measured_peak, model_flops_per_token
from nanochat_cli.training.gradient_step import GradientStep
from nanochat_kernels import (
    Granularity,
    fake_quantize_activations,
    fake_ternarize,
    pack_plane128,
    quantize_activations,
    ternarize,
    unpack_plane128,
)

PRESET = "nano-125m"
GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor", 256, 128, 64)
WARM_UP_STEPS = 5


def check_kernels(device: torch.device) -> list[Result]:
    """Every reference operation on `device` against the CPU. Raises ValidationFailure naming the first that differs."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2⁻¹⁰ below 1: their sums are exact in any order, so that the scales are equal and not only close.
    weight = torch.randint(-1023, 1024, (512, 1024), generator=generator) / 1024
    x = torch.randn(64, 1024, generator=generator) * torch.logspace(-6, 3, 64).unsqueeze(1)
    x[0] = 0.0
    codes = ternarize(weight).codes
    packed = pack_plane128(codes)
    pairs = {
        "quantize_activations: codes": (quantize_activations(x)[0], quantize_activations(x.to(device))[0]),
        "quantize_activations: scale": (quantize_activations(x)[1], quantize_activations(x.to(device))[1]),
        "fake_quantize_activations": (fake_quantize_activations(x), fake_quantize_activations(x.to(device))),
        "pack_plane128": (packed, pack_plane128(codes.to(device))),
        "unpack_plane128": (codes, unpack_plane128(packed.to(device), codes.shape[1])),
    }
    for granularity in GRANULARITIES:
        here, there = ternarize(weight, granularity), ternarize(weight.to(device), granularity)
        pairs[f"ternarize, {granularity}: codes"] = here.codes, there.codes
        pairs[f"ternarize, {granularity}: scales"] = here.scales, there.scales
        pairs[f"fake_ternarize, {granularity}"] = here.dequantize(), fake_ternarize(weight.to(device), granularity)
    for name, (expected, found) in pairs.items():
        if not torch.equal(expected, found.cpu()):
            differing = int((expected != found.cpu()).sum())
            raise ValidationFailure(f"{name}: {differing} of {expected.numel()} values on {device} are not the CPU's")
    print(f"{len(pairs)} results of the reference operations are equal bit for bit on {device} and the CPU", flush=True)
    return [Result("reference kernels", f"{name} equal to the CPU", 1.0, "1: yes, 0: no") for name in pairs]


class Contender:
    """A compiled model on a GPU that can be timed over whole training steps in bfloat16.

    peak_memory: bytes of parameters, optimizer state, activations and workspace, in the warm-up that compiles.
    """

    def __init__(self, config: Config, quantized: bool, device: torch.device) -> None:
        torch.manual_seed(0)
        quant = config.model.quant.model_copy(update={"enabled": quantized})
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        self.model = Transformer(config.model.model_copy(update={"quant": quant})).to(device)
        compile_blocks(self.model)
        self.optimizers = build_optimizer(self.model, config.optim)
        self.gradient_step = GradientStep(self.model, config.train, torch.bfloat16, print)
        self.train = config.train
        self.device = device
        shape = (config.train.batch_size, config.train.seq_len + 1)
        self.tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
        self.tokens_per_second(WARM_UP_STEPS)
        self.peak_memory = torch.cuda.max_memory_allocated(device) - before

    def tokens_per_second(self, steps: int) -> float:
        """Forward, backward, clip, update and requantisation, `steps` times."""
        torch.cuda.synchronize(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            self.gradient_step(self.tokens[:, :-1], self.tokens[:, 1:], self.optimizers.zero_grad)
            self.optimizers.clip_grad_norm(self.train.grad_clip)
            self.optimizers.step(1, self.train.total_steps)  # always the second step: nothing may diverge
            self.model.requantize()
        torch.cuda.synchronize(self.device)
        return steps * self.tokens[:, 1:].numel() / (time.perf_counter() - started)


def measure_training(config: Config, device: torch.device, rounds: int, steps: int) -> list[Result]:
    """Rounds of `steps` training steps, the ternary model and its float twin in turn."""
    ternary, twin = (Contender(config, quantized, device) for quantized in (True, False))
    ours: list[float] = []
    theirs: list[float] = []
    for turn in range(rounds):
        ours.append(ternary.tokens_per_second(steps))
        theirs.append(twin.tokens_per_second(steps))
        print(f"round {turn + 1}/{rounds}: ternary {ours[-1]:,.0f}, float twin {theirs[-1]:,.0f} tokens/s", flush=True)
    peak = measured_peak(device, torch.bfloat16)
    flops = model_flops_per_token(config.model, config.train.seq_len)
    case = f"{PRESET}, {config.train.batch_size} × {config.train.seq_len} tokens, bf16, compiled"
    return [
        summarise(case, "training rate", "tokens/s", ours, peer="float twin", peer_runs=theirs),
        summarise(case, "utilisation of the bf16 matmul peak", "share", [rate * flops / peak for rate in ours]),
        summarise(case, "bf16 matmul peak", "FLOP/s", [peak]),
        summarise(
            case,
            "peak memory",
            "bytes",
            [float(ternary.peak_memory)],
            peer="float twin",
            peer_runs=[float(twin.peak_memory)],
            smaller_is_better=True,
        ),
    ]


def run(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("benchmarks/gpu.py needs a CUDA device and torch finds none: run it on a machine with a GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    results = check_kernels(device)
    measured = measure_training(resolve_config([PRESET]), device, options.rounds, options.steps)
    for result in measured:
        ratio = "" if result.ratio is None else f", {result.ratio:.3f} × {result.peer}"
        print(f"{result.metric}, {result.case}: {result.value:.4g} {result.unit}{ratio}", flush=True)
    print(f"wrote {write_results(options.out, 'gpu', results + measured)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="training steps per round")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    try:
        run(parser.parse_args())
    except NanochatError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
