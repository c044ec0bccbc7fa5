"""Held-out bits per byte of every architecture after the same steps on the same data, paired over seeds.

    python benchmarks/architectures.py [--quick] [--steps 80] [--seeds 3]

All variants share the preset's (quickstart's) width, depth, optimizer, batches and their order; seeds differ in the
initial weights and the order of the data. Every run is an ordinary run of the trainer in a separate process, and the
variants take turns within a seed. Differences are paired by seed; the interval is their range, from six seeds on the
95 % bootstrap interval of their mean. `nanochat bench architectures` measures time and memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nanochat_cli.bench.micro.variants import VARIANTS
from nanochat_cli.report.result_file import Claim, Result, result_place, write_results
from nanochat_cli.report.statistics import seed_interval

QUICK = {
    "steps": 3,
    "seeds": 1,
    "variants": ["plain", "mhc-2"],
    "set": ["eval.final_max_tokens=8192", "bigram_init.steps=0"],
}


def one_run(arguments: argparse.Namespace) -> None:
    """The child process: trains one variant and prints one JSON line."""
    from nanochat_cli.config.load import resolve_config
    from nanochat_cli.data.prepare import cached_dataset
    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.report.reporter import PlainReporter, QuietReporter
    from nanochat_cli.training.shard_data import ShardData
    from nanochat_cli.training.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *VARIANTS[arguments.one],
            f"run.seed={arguments.seed}",
            f"run.dir={folder}",
            f"train.total_steps={arguments.steps}",
            "train.compile=off",
            "telemetry.tensorboard=false",
            f"eval.interval={10 * arguments.steps}",
            f"checkpoint.interval={10 * arguments.steps}",
            *arguments.set,
        ]
        config = resolve_config([arguments.preset], None, overrides)
        config.train.time_budget = None
        config.run.name = "run"
        data = ShardData(
            ShardReader(cached_dataset(config, PlainReporter()), vocab_size=config.model.vocab_size), config
        )
        run = Path(folder, "run")
        run.mkdir()
        result = Trainer(config, data, run, QuietReporter()).fit()
    values = {"bits_per_byte": result.held_out.bits_per_byte, "parameters": result.parameters}
    print(json.dumps(values | {"tokens": result.progress.tokens, "skipped": result.skipped}))


def judge(runs: dict[str, list[dict[str, Any]]]) -> tuple[list[Result], list[Claim]]:
    """Results per variant and a claim for each but the plain one; ratio: plain / variant, above 1 is better."""
    results, claims = [], []
    plain = [run["bits_per_byte"] for run in runs["plain"]]
    for variant, of_seeds in runs.items():
        values = [run["bits_per_byte"] for run in of_seeds]
        ratio = statistics.median(p / v for p, v in zip(plain, values, strict=True))
        spread = (min(values), max(values))
        other = variant != "plain"
        results.append(
            Result(
                variant,
                "held-out bits per byte",
                statistics.median(values),
                "bits/byte",
                "plain" if other else None,
                ratio if other else None,
                values,
                spread,
            )
        )
        results += [Result(variant, key, of_seeds[0][key], key) for key in ("parameters", "tokens")]
        if other:
            differences = [v - p for v, p in zip(values, plain, strict=True)]
            low, high = seed_interval(differences) or (differences[0], differences[0])
            mean = statistics.mean(differences)
            results.append(
                Result(variant, "difference to plain", mean, "bits/byte", runs=differences, spread=(low, high))
            )
            claims.append(
                Claim(
                    f"architectures-{variant}",
                    f"{variant} has fewer bits per byte than the plain model after the same steps",
                    "docs/methods",
                    "< 0",
                    f"{mean:+.4f}",
                    "supported" if high < 0 else "not supported",
                    (low, high),
                    len(values),
                )
            )
    return results, claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="concurrent runs; results do not depend on it")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("architectures", arguments.out, quick=arguments.quick)
    if arguments.one:
        one_run(arguments)
        return
    runs: dict[str, list[dict[str, Any]]] = {variant: [] for variant in arguments.variants}
    for seed in range(1, arguments.seeds + 1):

        def run(variant: str, seed: int = seed) -> dict[str, Any]:
            command = [sys.executable, __file__, "--one", variant, "--seed", str(seed), "--preset", arguments.preset]
            command += ["--steps", str(arguments.steps)]
            command += [part for value in arguments.set for part in ("--set", value)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values = json.loads(finished.stdout.strip().splitlines()[-1])
            print(f"seed {seed}  {variant:10s} {json.dumps(values)}", flush=True)
            return values

        with ThreadPoolExecutor(arguments.parallel) as pool:
            for variant, values in zip(arguments.variants, pool.map(run, arguments.variants), strict=True):
                runs[variant].append(values)
        write_results(out, "architectures", *judge(runs), steps=arguments.steps, seeds=seed)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
