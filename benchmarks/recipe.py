"""Held-out bits per byte after a fixed time of training: our ternary model, its float twin, and karpathy/nanochat.

    python benchmarks/recipe.py --peer PATH [--quick] [--seconds 120] [--short 40] [--seeds 3]

PATH is a checkout of https://github.com/karpathy/nanochat; without it only the two forms of our own model are compared.
Every run is a separate process, on the embedded corpus with one tokenizer and one split, in the batch order of its
seed; the contenders take turns within a seed. Each compiles, times a few steps, starts again from its seed and takes as
many steps as fit into the time. The time includes our bigram start, and nobody's compilation or choice of number
formats. With a peer our model is also trained for only --short seconds, to be compared with the peer's after the whole
time. The peer is that project's model class with the same width and depth, its optimizer with the learning rates of its
`base_train` script (multiplied by --peer-lr-scale for this batch size; the script's own rule for such small batches
would be 1/16), its schedule, and torch.compile as in that script.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.optim import build_optimizer
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Claim, Result, result_place, write_results
from nanochat_cli.training.bits_per_byte import evaluate
from nanochat_cli.training.build import build_state
from nanochat_cli.training.compilation import compile_blocks
from nanochat_cli.training.cpp_compiler import find_compiler
from nanochat_cli.training.methods.bigram_start import count_bigrams, fit_bigrams
from nanochat_cli.training.next_token import train_step
from nanochat_cli.training.number_formats import choose_number_formats, use_number_formats
from nanochat_cli.training.shard_data import ShardData

CALIBRATION_STEPS = 6
CONTENDERS = ("ternary", "float", "short", "nanochat")
"""short: the ternary one, for less time."""
CLAIMS = {
    "nanochat": ("ternary", "nanochat", 1.00),
    "float": ("ternary", "float", 1.02),
    "short": ("short", "nanochat", 1.00),
}
"""Name → whose bits per byte are at most so many times whose."""


QUICK = {"seconds": 3.0, "short": 2.0, "seeds": 1, "set": ["eval.final_max_tokens=8192", "bigram_init.steps=0"]}


def measure(
    step: Callable[[int, int], None], restart: Callable[[], None], begin: Callable[[], None], seconds: float
) -> tuple[int, float]:
    """Compile, calibrate, start again, train; returns steps taken and seconds used.

    step(index, total_steps) is one training step; begin() is the work before the first, which counts.
    """
    times = []
    for index in range(2 + CALIBRATION_STEPS):
        started = time.perf_counter()
        step(index, 1000)
        times.append(time.perf_counter() - started)
    restart()
    started = time.perf_counter()
    begin()
    left = seconds - (time.perf_counter() - started)
    total = max(1, int(left / statistics.median(times[2:])))
    for index in range(total):
        step(index, total)
    return total, time.perf_counter() - started


def run_ours(config: Config, data: ShardData, seconds: float) -> dict[str, Any]:
    """One run of our model, ternary or float by configuration."""
    torch.manual_seed(config.run.seed)
    state = build_state(config, torch.device("cpu"), PlainReporter(), methods={})
    state.skip_policy.spike_factor = math.inf
    choose_number_formats(state, config, PlainReporter())
    use_number_formats(state, config)
    model = state.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if find_compiler().path is not None:
        compile_blocks(model)

    def restart() -> None:
        model.load_state_dict(start)
        model.requantize()
        state.optimizers = build_optimizer(model, config.optim)
        use_number_formats(state, config)

    def step(index: int, total: int) -> None:
        state.progress.step, state.progress.total_steps = index, total
        train_step(state, *data.batch(index))

    def begin() -> None:
        if config.bigram_init.steps:
            bigrams = count_bigrams(data.pieces(), config.model.vocab_size)
            list(fit_bigrams(model, bigrams, config.bigram_init))

    steps, used = measure(step, restart, begin, seconds)
    with torch.compiler.set_stance("force_eager"):
        held_out = evaluate(model, data.held_out(config.eval.final_max_tokens), data.token_bytes)
    parameters = sum(p.numel() for p in model.parameters())
    return {"bits_per_byte": held_out.bits_per_byte, "steps": steps, "seconds": used, "parameters": parameters}


def run_peer(config: Config, data: ShardData, seconds: float, peer: Path, lr_scale: float) -> dict[str, Any]:
    """One run of karpathy/nanochat's model, optimizer and schedule, imported from a checkout of it."""
    sys.path.insert(0, str(peer))
    from nanochat.gpt import GPT, GPTConfig  # pyright: ignore[reportMissingImports] - the checkout

    shape = GPTConfig(
        sequence_len=config.train.seq_len,
        vocab_size=config.model.vocab_size,
        n_layer=config.model.n_layers,
        n_head=config.model.n_heads,
        n_kv_head=config.model.n_kv_heads,
        n_embd=config.model.dim,
        window_pattern="L",
    )
    with torch.device("meta"):
        model = GPT(shape)
    model.to_empty(device="cpu")
    compiled = torch.compile(model, dynamic=False)
    state: dict[str, Any] = {}

    def restart() -> None:
        torch.manual_seed(config.run.seed)
        model.init_weights()
        state["optimizer"] = model.setup_optimizer(
            unembedding_lr=0.008 * lr_scale,
            embedding_lr=0.3 * lr_scale,
            matrix_lr=0.02 * lr_scale,
            scalar_lr=0.5 * lr_scale,
        )

    def step(index: int, total: int) -> None:
        inputs, targets = data.batch(index)
        compiled(inputs, targets).backward()
        for group in state["optimizer"].param_groups:
            group["lr"] = group["initial_lr"] * peer_lr(index, total)
            if group["kind"] == "muon":
                group["momentum"] = peer_momentum(index, total)
        state["optimizer"].step()
        model.zero_grad(set_to_none=True)

    restart()
    steps, used = measure(step, restart, lambda: None, seconds)
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "bits_per_byte": peer_bits_per_byte(model, data, config.eval.final_max_tokens),
        "steps": steps,
        "seconds": used,
        "parameters": parameters,
    }


def peer_lr(step: int, total: int, warmup: int = 40, warmdown: float = 0.65, final: float = 0.05) -> float:
    """The schedule of the peer's base_train script: warm-up, flat, linear to `final`."""
    if step < warmup:
        return (step + 1) / warmup
    down = round(warmdown * total)
    if step <= total - down:
        return 1.0
    left = (total - step) / down
    return left + (1 - left) * final


def peer_momentum(step: int, total: int, warmdown: float = 0.65) -> float:
    """Muon momentum of the peer's base_train script: .85 to .97 over 400 steps, down to .90 in the warm-down."""
    down = round(warmdown * total)
    if step < 400:
        return 0.85 + 0.12 * step / 400
    if step >= total - down:
        progress = (step - (total - down)) / down
        return 0.97 * (1 - progress) + 0.90 * progress
    return 0.97


@torch.no_grad()
def peer_bits_per_byte(model: Any, data: ShardData, max_tokens: int | None) -> float:
    """The definition of `training.bits_per_byte`, on the peer's per-token losses."""
    nats, count = 0.0, 0
    for inputs, targets in data.held_out(max_tokens):
        losses: Tensor = model(inputs, targets.where(targets >= 0, -1), loss_reduction="none").reshape(-1).double()
        flat = targets.reshape(-1)
        lengths = torch.where(flat >= 0, data.token_bytes[flat.clamp(min=0)], 0)
        nats += float((losses * (lengths > 0)).sum())
        count += int(lengths.sum())
    return nats / math.log(2) / count


def one_run(arguments: argparse.Namespace) -> None:
    """The child process: prints one JSON line."""
    contender = arguments.one
    overrides = [*arguments.set, f"run.seed={arguments.seed}"]
    if contender == "float":
        overrides.append("model.quant.enabled=false")
    reporter = PlainReporter()
    config = resolve_config([arguments.preset], None, overrides)
    reader = ShardReader(cached_dataset(config, reporter), vocab_size=config.model.vocab_size)
    data = ShardData(reader, config)
    if contender == "nanochat":
        values = run_peer(config, data, arguments.seconds, arguments.peer, arguments.peer_lr_scale)
    else:
        values = run_ours(config, data, arguments.short if contender == "short" else arguments.seconds)
    print(json.dumps(values))


def all_runs(arguments: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Every contender of every seed, alternating, each in a separate process."""
    contenders = [c for c in CONTENDERS if c not in ("short", "nanochat") or arguments.peer is not None]
    for seed in range(1, arguments.seeds + 1):
        for contender in contenders:
            command = [sys.executable, __file__, "--one", contender, "--seed", str(seed), "--preset", arguments.preset]
            command += [
                "--seconds",
                str(arguments.seconds),
                "--short",
                str(arguments.short),
                "--peer-lr-scale",
                str(arguments.peer_lr_scale),
            ]
            command += [part for value in arguments.set for part in ("--set", value)]
            command += [] if arguments.peer is None else ["--peer", str(arguments.peer)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values = json.loads(finished.stdout.strip().splitlines()[-1])
            print(f"seed {seed}  {contender:9s} {json.dumps(values)}", flush=True)
            yield contender, seed, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="checkout of karpathy/nanochat")
    parser.add_argument("--peer-lr-scale", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--short", type=float, default=40.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer and not (arguments.peer / "nanochat" / "gpt.py").is_file():
        parser.error(f"--peer {arguments.peer}: no nanochat/gpt.py; give the root of a checkout of karpathy/nanochat")
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("recipe", arguments.out, quick=arguments.quick)
    if arguments.one:
        one_run(arguments)
        return
    runs: dict[str, list[dict[str, Any]]] = {}
    for contender, _, values in all_runs(arguments):
        runs.setdefault(contender, []).append(values)
    print(f"wrote {write_results(out, 'recipe', *judge(runs, arguments.seconds, arguments.short))}")


def judge(runs: dict[str, list[dict[str, Any]]], seconds: float, short: float) -> tuple[list[Result], list[Claim]]:
    """Results and claims; ratios are ternary / contender in bits per byte, paired by seed."""
    results, claims = [], []
    ours = [run["bits_per_byte"] for run in runs["ternary"]]
    case = f"{seconds:.0f} s of training"
    for contender, of_seeds in runs.items():
        values = [run["bits_per_byte"] for run in of_seeds]
        ratios = [mine / theirs for mine, theirs in zip(ours, values, strict=True)]
        tokens = ("steps", "seconds", "parameters")
        of = f"{short:.0f} s of training: ternary" if contender == "short" else f"{case}: {contender}"
        results.append(
            Result(
                of,
                "held-out bits per byte",
                statistics.median(values),
                "bits/byte",
                peer=None if contender == "ternary" else "ternary",
                ratio=None if contender == "ternary" else statistics.median(ratios),
                runs=values,
                spread=(min(values), max(values)),
            )
        )
        results += [Result(of, key, statistics.median(run[key] for run in of_seeds), key) for key in tokens]
    for name, (left, right, target) in CLAIMS.items():
        if not {left, right} <= runs.keys():
            continue
        ratios = [a["bits_per_byte"] / b["bits_per_byte"] for a, b in zip(runs[left], runs[right], strict=True)]
        middle = statistics.median(ratios)
        after = case if left == "ternary" else f"{short:.0f} s, {right}'s after {case}"
        claims.append(
            Claim(
                id=f"recipe-{name}",
                statement=f"ternary bits per byte ≤ {target:.2f} × {right} after {after}",
                source="docs/training.md",
                expected=f"≤ {target:.2f}",
                measured=f"{middle:.4f} (median of paired ratios)",
                verdict="supported" if middle <= target else "not supported",
                interval=(min(ratios), max(ratios)),
                seeds=len(ratios),
            )
        )
    return results, claims


if __name__ == "__main__":
    main()
