"""Training speed of the ternary model against the same model with float linears, in one process.

    python benchmarks/qat_overhead.py [--quick] [--rounds 7]

For about 2 M and 20 M parameters: whole training steps (forward, backward, clip, optimizer, requantisation), compiled,
the two models alternating; tokens per second of each round and their ratio, and the utilisation against the best of
three large matrix products timed right after each round. The smaller model is also measured eagerly. `--quick` is one
round of the smaller model with a small batch, compiled only: it checks the benchmark, and its figures say little.
"""

import argparse
import time
from pathlib import Path

import torch

from nanochat_cli.config.schema import Config
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results
from nanochat_cli.training.build import build_state
from nanochat_cli.training.compilation import compile_blocks
from nanochat_cli.training.flops import model_flops_per_token
from nanochat_cli.training.next_token import train_step

SHAPES = {
    "2M": {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "vocab_size": 2048},
    "20M": {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 1536, "vocab_size": 4096},
}
BATCH = {"2M": 16, "20M": 32}
MICRO_BATCH = 16
QUICK_BATCH = {"2M": 4}
SEQ_LEN = 256


class Contender:
    """A model that takes single training steps and times them."""

    def __init__(self, shape: dict[str, int], batch: int, quantized: bool, compiled: bool) -> None:
        torch.manual_seed(0)
        settings = {**shape, "max_seq_len": SEQ_LEN, "qk_norm": True, "quant": {"enabled": quantized}}
        train = {"total_steps": 100, "batch_size": MICRO_BATCH, "seq_len": SEQ_LEN, "spike_factor": 1e9}
        whole = Config.model_validate({"model": settings, "train": train})
        self.config = whole.model
        self.state = build_state(whole, torch.device("cpu"), PlainReporter(), methods={})
        self.state.progress.step = 1  # always the second of a run: nothing diverges
        if compiled:
            compile_blocks(self.state.model)
        self.tokens = torch.randint(0, shape["vocab_size"], (batch, SEQ_LEN + 1))

    def step(self) -> float:
        """Take one training step; returns its seconds."""
        started = time.perf_counter()
        train_step(self.state, self.tokens[:, :-1], self.tokens[:, 1:])
        return time.perf_counter() - started


def sgemm_flops(n: int = 2048) -> float:
    """FLOP/s of one large float32 product, measured now."""
    left, right = torch.ones(n, n), torch.ones(n, n)
    started = time.perf_counter()
    torch.mm(left, right)
    return 2 * n**3 / (time.perf_counter() - started)


def compare(name: str, batch: int, rounds: int, compiled: bool) -> list[Result]:
    """Interleaved rounds of ternary and float steps of one shape."""
    shape = SHAPES[name]
    ternary, twin = (Contender(shape, batch, quantized, compiled) for quantized in (True, False))
    for contender in (ternary, twin, ternary, twin):
        contender.step()
    tokens = batch * SEQ_LEN
    rates: dict[str, list[float]] = {"ternary": [], "float": []}
    peaks: list[float] = []
    for _ in range(rounds):
        rates["ternary"].append(tokens / ternary.step())
        rates["float"].append(tokens / twin.step())
        peaks.append(max(sgemm_flops() for _ in range(3)))
    form = "compiled" if compiled else "eager"
    parameters = sum(p.numel() for p in ternary.state.model.parameters())
    case = f"{name} ({parameters / 1e6:.1f} M parameters), {form}"
    flops = model_flops_per_token(ternary.config, SEQ_LEN)
    utilisation = [rate * flops / peak for rate, peak in zip(rates["ternary"], peaks, strict=True)]
    results = [
        summarise(case, "training rate", "tokens/s", rates["ternary"], peer="float twin", peer_runs=rates["float"]),
        summarise(case, "utilisation of the SGEMM peak", "share", utilisation),
        summarise(case, "SGEMM peak", "FLOP/s", peaks),
    ]
    for result in results:
        ratio = "" if result.ratio is None else f"  {result.ratio:.3f} × {result.peer}"
        print(f"{result.case}: {result.metric} {result.value:.4g} {result.unit}{ratio}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of the smaller model: under a minute")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("qat_overhead", arguments.out, quick=arguments.quick)
    rounds, batches = (1, QUICK_BATCH) if arguments.quick else (arguments.rounds, BATCH)
    results = [
        result
        for name in batches
        for compiled in ((True, False) if name == "2M" and not arguments.quick else (True,))
        for result in compare(name, batches[name], rounds, compiled)
    ]
    print(f"wrote {write_results(out, 'qat_overhead', results)}")


if __name__ == "__main__":
    main()
