"""What each choice of the quickstart recipe is worth: the same steps with one change at a time.

    python benchmarks/recipe_search.py [--quick] [--steps 100] [--only NAME ...]

One seed, matched steps (not time), the embedded corpus; held-out bits per byte at the end. With one seed, differences
below about 0.005 are noise. `recipe.py` compares the result with others, in equal time and over seeds.
"""

import argparse
import tempfile
from pathlib import Path

from nanochat_cli.config.load import resolve_config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, result_place, write_results
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer

RANDOM_START = ["bigram_init.steps=0", "optim.embedding_lr=0.3", "optim.head_lr=0.008", "optim.lr=0.02"]
VARIANTS: dict[str, list[str]] = {
    "quickstart": [],
    "float twin": ["model.quant.enabled=false"],
    "random start": RANDOM_START,
    "random start, head lr 0.004": [*RANDOM_START, "optim.head_lr=0.004"],
    "random start, matrix lr 0.01": [*RANDOM_START, "optim.lr=0.01"],
    "random start, NorMuon": [*RANDOM_START, "optim.muon_variance_beta=0.9", "optim.muon_equilibrate=true"],
    "random start, 3 Polar Express steps": [
        *RANDOM_START,
        "optim.muon_ns_steps=3",
        "optim.muon_coefficients=polar-express",
    ],
    "bigram start, embedding and head at the rates of a random start": [
        "optim.embedding_lr=0.3",
        "optim.head_lr=0.008",
    ],
    "bigram start, embedding lr 0.05, head lr 0.002": ["optim.embedding_lr=0.05", "optim.head_lr=0.002"],
    "bigram start, matrix lr 0.02": ["optim.lr=0.02"],
    "bigram start, matrix lr 0.08": ["optim.lr=0.08"],
}


QUICK = {"steps": 3, "only": [name for name in VARIANTS if name.startswith("random")][:2]}


def bits_per_byte(overrides: list[str], steps: int, reporter: PlainReporter) -> float:
    """Held-out bits per byte of quickstart with overrides after `steps` steps."""
    fixed = [f"train.total_steps={steps}", "train.time_budget=none", "optim.warmup_steps=10"]
    fixed += ["eval.interval=1000000", "checkpoint.interval=1000000", "telemetry.tensorboard=false"]
    config = resolve_config(["quickstart"], None, [*overrides, *fixed])
    reader = ShardReader(cached_dataset(config, reporter), vocab_size=config.model.vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        return Trainer(config, ShardData(reader, config), Path(folder), reporter).fit().held_out.bits_per_byte


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("recipe_search", arguments.out, quick=arguments.quick)
    reporter = PlainReporter()
    results = []
    for name in arguments.only:
        short = ["eval.final_max_tokens=8192"] if arguments.quick else []
        value = bits_per_byte([*VARIANTS[name], *short], arguments.steps, reporter)
        print(f"{name}: {value:.4f}", flush=True)
        results.append(Result(name, f"held-out bits per byte, {arguments.steps} steps", value, "bits/byte"))
    print(f"wrote {write_results(out, 'recipe_search', results)}")


if __name__ == "__main__":
    main()
