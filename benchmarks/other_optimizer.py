"""AdamW against Lion for the parameters that Muon leaves (embedding, head, norms), each at its best rate.

    python benchmarks/other_optimizer.py [--steps 100] [--seeds 3] [--out benchmarks/results/other_optimizer.json]

The quickstart's shape from random weights (a bigram start would leave little to these parameters), Muon for the
matrices in both, steps of 512 tokens of the embedded corpus. On seed 0 each optimizer tries as many rates: factors on
`optim.embedding_lr`, `head_lr` and `scalar_lr` together. Both then train seeds 1, 2, … at their best factor, on the
same batches. Steps are matched, not time; neither has weight decay. The interval is the smallest and largest paired
difference.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from nanochat_cli.config.load import resolve_config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Claim, Result, summarise, write_results
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer

RATES = {"embedding_lr": 0.3, "head_lr": 0.004, "scalar_lr": 0.01}
"""The schema's defaults, which a factor multiplies."""
FACTORS = {"adamw": (0.3, 1.0, 3.0), "lion": (0.1, 0.3, 1.0)}
METRIC = "held-out bits per byte"


def bits_per_byte(optimizer: str, factor: float, seed: int, steps: int, reporter: PlainReporter) -> float:
    """Held-out bits per byte after one run."""
    fixed = [f"train.total_steps={steps}", "train.time_budget=none", "train.compile=off", "bigram_init.steps=0"]
    fixed += ["optim.lr=0.02", "optim.warmup_steps=10", "optim.lion_lr_mult=1", f"optim.other={optimizer}"]
    fixed += ["train.batch_size=2", "eval.interval=1000000", "eval.max_tokens=512", "eval.final_max_tokens=32768"]
    fixed += ["checkpoint.interval=1000000", "telemetry.tensorboard=false"]
    rates = [f"optim.{key}={rate * factor:g}" for key, rate in RATES.items()]
    config = resolve_config(["quickstart"], None, [*fixed, *rates, f"run.seed={seed}"])
    reader = ShardReader(cached_dataset(config, reporter), vocab_size=config.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        value = Trainer(config, ShardData(reader, config), Path(folder), reporter).fit().held_out.bits_per_byte
    print(f"{optimizer}, rates × {factor:g}, seed {seed}: {value:.4f}", flush=True)
    return value


def judge(tuned: dict[str, dict[float, float]], runs: dict[str, list[float]], steps: int) -> tuple[list[Result], Claim]:
    """tuned: optimizer → factor → bits per byte on the tuning seed; runs: optimizer → values of the other seeds."""
    results = [
        Result(f"tuning seed, {name}, rates × {factor:g}", METRIC, value, "bits/byte", runs=[value])
        for name, grid in tuned.items()
        for factor, value in grid.items()
    ]
    for name, values in runs.items():
        case = f"{steps} steps, {name} at its best rates"
        results.append(
            summarise(
                case,
                METRIC,
                "bits/byte",
                values,
                peer=None if name == "adamw" else "adamw",
                peer_runs=None if name == "adamw" else runs["adamw"],
                smaller_is_better=True,
            )
        )
    differences = [lion - adamw for lion, adamw in zip(runs["lion"], runs["adamw"], strict=True)]
    claim = Claim(
        id="other-adamw",
        statement="AdamW for embedding, head and norms ends at fewer bits per byte than Lion, each at its best rate",
        source="docs/training.md",
        expected="above 0 with every seed",
        measured=f"{statistics.median(differences):.4f} bits per byte (median of Lion minus AdamW)",
        verdict="supported" if min(differences) > 0 else "not supported",
        interval=(min(differences), max(differences)),
        seeds=len(differences),
    )
    return results, claim


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "other_optimizer.json")
    arguments = parser.parse_args()
    reporter = PlainReporter()
    tuned = {
        name: {factor: bits_per_byte(name, factor, 0, arguments.steps, reporter) for factor in factors}
        for name, factors in FACTORS.items()
    }
    best = {name: min(grid, key=grid.__getitem__) for name, grid in tuned.items()}
    runs: dict[str, list[float]] = {name: [] for name in FACTORS}
    for seed in range(1, arguments.seeds + 1):
        for name, factor in best.items():
            runs[name].append(bits_per_byte(name, factor, seed, arguments.steps, reporter))
    results, claim = judge(tuned, runs, arguments.steps)
    print(f"wrote {write_results(arguments.out, 'other_optimizer', results, [claim])}")


if __name__ == "__main__":
    main()
