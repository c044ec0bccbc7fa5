"""Training speed of ternary models against the same models with float linears, in one process.

    python benchmarks/qat_overhead.py [--quick] [--rounds 7] [--shapes 2M 5.5M 20M 100M]

Whole training steps (forward, backward, clip, optimizer, requantisation), compiled, the contenders alternating; tokens
per second of each round and their ratio to the float32 twin, and the share of a step that the optimizer takes. Ternary
models train with the exact backward pass and with the formats that `auto` finds fastest here. The bf16 twin is the
float twin under autocast, with Newton-Schulz in bfloat16. Utilisation is that of the exact ternary model against the
best of three large matrix products timed right after each round. The smallest model is also measured eagerly; the
largest only when asked for. `--quick` is one round of the smallest with a small batch, compiled only: it checks the
benchmark, and its figures say little.
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
from nanochat_cli.training.number_formats import choose_number_formats, use_number_formats
from nanochat_cli.training.phases import make_phases

SHAPES = {
    "2M": {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 512, "vocab_size": 2048},
    "5.5M": {"dim": 256, "n_layers": 4, "n_heads": 4, "n_kv_heads": 4, "ffn_dim": 768, "vocab_size": 4096},
    "20M": {"dim": 512, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4, "ffn_dim": 1536, "vocab_size": 4096},
    "100M": {"dim": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": 4, "ffn_dim": 2816, "vocab_size": 8192},
}
BATCH = {"2M": 16, "5.5M": 8, "20M": 8, "100M": 8}
"""Sequences of a step, all in one micro-batch."""
ROUNDS = {"100M": 5}
QUICK_BATCH = {"2M": 4}
SEQ_LEN = 256
TWIN = "float twin"
CONTENDERS: dict[str, dict[str, dict[str, object]]] = {
    "ternary": {},
    "ternary, auto": {"train": {"backward": "auto", "attention": "auto"}, "optim": {"muon_format": "auto"}},
    TWIN: {"model": {"quant": {"enabled": False}}},
    "bf16 float twin": {
        "model": {"quant": {"enabled": False}},
        "train": {"dtype": "bf16"},
        "optim": {"muon_format": "bf16"},
    },
}


class Contender:
    """A model that takes single training steps and times them."""

    def __init__(self, shape: str, batch: int, changes: dict[str, dict[str, object]], compiled: bool) -> None:
        torch.manual_seed(0)
        model = {**SHAPES[shape], "max_seq_len": SEQ_LEN, "qk_norm": True, **changes.get("model", {})}
        train = {"batch_size": batch, "seq_len": SEQ_LEN, "spike_factor": 1e9, **changes.get("train", {})}
        whole = Config.model_validate({"model": model, "train": train, "optim": changes.get("optim", {})})
        self.config = whole.model
        self.state = build_state(whole, torch.device("cpu"), PlainReporter(), methods={})
        self.state.phases = make_phases(True, torch.device("cpu"))
        choose_number_formats(self.state, whole, PlainReporter())
        use_number_formats(self.state, whole)
        self.state.progress.step = 1  # always the second of a run: nothing diverges
        if compiled:
            compile_blocks(self.state.model)
        self.tokens = torch.randint(0, self.config.vocab_size, (batch, SEQ_LEN + 1))

    def step(self) -> float:
        """Take one training step; returns its seconds."""
        started = time.perf_counter()
        train_step(self.state, self.tokens[:, :-1], self.tokens[:, 1:])
        return time.perf_counter() - started

    def optimizer_share(self) -> float:
        """Of the steps since the last call."""
        milliseconds = self.state.phases.read()
        return milliseconds["time/optimizer_ms"] / sum(milliseconds.values())


def sgemm_flops(n: int = 2048) -> float:
    """FLOP/s of one large float32 product, measured now."""
    left, right = torch.ones(n, n), torch.ones(n, n)
    started = time.perf_counter()
    torch.mm(left, right)
    return 2 * n**3 / (time.perf_counter() - started)


def compare(name: str, batch: int, rounds: int, compiled: bool) -> list[Result]:
    """Interleaved rounds of every contender of one shape."""
    torch.compiler.reset()  # else the blocks of so many models pass torch's limit, and later ones run eagerly
    contenders = {kind: Contender(name, batch, changes, compiled) for kind, changes in CONTENDERS.items()}
    for contender in contenders.values():
        contender.step()
        contender.step()
        contender.optimizer_share()
    tokens = batch * SEQ_LEN
    rates: dict[str, list[float]] = {kind: [] for kind in contenders}
    shares: dict[str, list[float]] = {kind: [] for kind in contenders}
    peaks: list[float] = []
    for _ in range(rounds):
        for kind, contender in contenders.items():
            rates[kind].append(tokens / contender.step())
            shares[kind].append(contender.optimizer_share())
        peaks.append(max(sgemm_flops() for _ in range(3)))
    exact = contenders["ternary"]
    parameters = sum(p.numel() for p in exact.state.model.parameters())
    case = f"{name} ({parameters / 1e6:.1f} M parameters), {'compiled' if compiled else 'eager'}"
    flops = model_flops_per_token(exact.config, SEQ_LEN)
    utilisation = [rate * flops / peak for rate, peak in zip(rates["ternary"], peaks, strict=True)]
    results = [
        summarise(case, "training rate", "tokens/s", rates["ternary"], peer=TWIN, peer_runs=rates[TWIN]),
        summarise(case, "utilisation of the SGEMM peak", "share", utilisation),
        summarise(case, "SGEMM peak", "FLOP/s", peaks),
    ]
    for peer in (TWIN, "bf16 float twin", "ternary"):
        metric = f"training rate, auto, against the {peer}"
        results.append(summarise(case, metric, "tokens/s", rates["ternary, auto"], peer=peer, peer_runs=rates[peer]))
    results += [summarise(case, f"optimizer's share of a step, {kind}", "share", shares[kind]) for kind in contenders]
    for result in results:
        ratio = "" if result.ratio is None else f"  {result.ratio:.3f} × {result.peer}"
        print(f"{result.case}: {result.metric} {result.value:.4g} {result.unit}{ratio}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of the smallest model: under a minute")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "100M"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("qat_overhead", arguments.out, quick=arguments.quick)
    batches = QUICK_BATCH if arguments.quick else {name: BATCH[name] for name in arguments.shapes}
    results = [
        result
        for name in batches
        for compiled in ((True, False) if name == "2M" and not arguments.quick else (True,))
        for result in compare(
            name, batches[name], 1 if arguments.quick else ROUNDS.get(name, arguments.rounds), compiled
        )
    ]
    print(f"wrote {write_results(out, 'qat_overhead', results)}")


if __name__ == "__main__":
    main()
