"""Does FIRE help when the data changes? Train on Python, continue on Rust, four ways, paired over seeds.

    python benchmarks/plasticity.py FOLDER [--quick] [--steps 80] [--seeds 3]

FOLDER holds unpacked Rust crates (for example from Debian's librust-*-dev packages). Phase one trains on the Python
standard library, phase two resumes that run on the Rust sources for as many steps. At the boundary:

    none                nothing
    fire                the block matrices move to their nearest isometry of the same norm (fire.trigger = phase)
    shrink-and-perturb  the block matrices become half themselves plus half a fresh initialisation (arXiv:1910.08475)
    reset               every parameter gets a fresh initialisation

All but `none` reset the optimizer state of what they changed and warm up again. Within a seed all have the same
batches. The tokenizer was trained on Python alone, as in a run that later meets other data. There is no bigram start.
Differences are paired by seed; the interval is their range, from six seeds on the 95 % bootstrap interval of the mean.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import torch

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config, FireConfig
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.report.result_file import Claim, Result, result_place, write_results
from nanochat_cli.report.statistics import seed_interval
from nanochat_cli.training.bits_per_byte import evaluate
from nanochat_cli.training.methods.fire import Fire, FireState
from nanochat_cli.training.shard_data import ShardData
from nanochat_cli.training.trainer import Trainer

ARMS = ("none", "fire", "shrink-and-perturb", "reset")
KEPT = 0.5
"""Share of the old weights in shrink-and-perturb."""
METRICS = {
    "rust": "Rust, held-out bits per byte",
    "early": "Rust after a quarter of the phase, bits per byte",
    "python": "Python afterwards, held-out bits per byte",
}


QUICK = {"steps": 4, "seeds": 1, "eval_tokens": 512, "max_bytes": 1_000_000, "rewarm": 2}


def phase_config(arguments: argparse.Namespace, seed: int, folder: Path, path: Path, steps: int) -> Config:
    """The configuration of the phase that trains on the data set `path` up to `steps`."""
    overrides = [
        f"run.seed={seed}",
        f"run.dir={folder}",
        f"data.path={path}",
        f"train.total_steps={steps}",
        f"train.batch_size={arguments.batch_size}",
        f"model.n_layers={arguments.layers}",
        *("model.dim=128", "model.ffn_dim=384", "model.n_heads=2", "model.n_kv_heads=2"),
        "train.compile=off",
        "telemetry.tensorboard=false",
        "bigram_init.steps=0",
        "optim.embedding_lr=0.3",  # the defaults, which suit a start without bigrams
        "optim.head_lr=0.004",
        f"eval.interval={arguments.steps // 4}",
        "eval.max_tokens=4096",
        f"eval.final_max_tokens={arguments.eval_tokens}",
        f"checkpoint.interval={10 * steps}",
        "checkpoint.keep_best=false",
        *arguments.set,
    ]
    config = resolve_config(["quickstart"], None, overrides)
    config.train.time_budget = None
    return config


def load_data(config: Config) -> ShardData:
    assert config.data.path is not None
    return ShardData(ShardReader(config.data.path, vocab_size=config.model.vocab_size), config)


def change_weights(trainer: Trainer, fire: Fire, arm: str, seed: int) -> None:
    """Shrink-and-perturb or reset at the boundary, instead of FIRE's event."""
    torch.manual_seed(1000 + seed)
    model, optimizers = trainer.state.model, trainer.state.optimizers
    fresh = Transformer(trainer.config.model)
    chosen = {f"{name}.weight" for name in fire.layers}
    with torch.no_grad():
        for (name, parameter), new in zip(model.named_parameters(), fresh.parameters(), strict=True):
            if arm == "reset":
                parameter.copy_(new)
            elif name in chosen:
                parameter.lerp_(new, 1 - KEPT)
    model.requantize()
    everything = {name for name, _ in model.named_parameters()}
    optimizers.reset(everything if arm == "reset" else chosen)
    fire.data_changed, fire.state = False, FireState(1, trainer.progress.step)


def bits_per_byte(trainer: Trainer, data: ShardData, max_tokens: int) -> float:
    return evaluate(trainer.state.model, data.held_out(max_tokens), data.token_bytes).bits_per_byte


def one_seed(
    arguments: argparse.Namespace, seed: int, python: Path, rust: Path, folder: Path
) -> dict[str, dict[str, float]]:
    """Measurements of every arm, and of the boundary as `before`."""
    quiet = QuietReporter()
    config = phase_config(arguments, seed, folder, python, arguments.steps)
    python_data = load_data(config)
    first = folder / "first"
    first.mkdir()
    trainer = Trainer(config, python_data, first, quiet)
    trainer.fit()
    continued = phase_config(arguments, seed, folder, rust, 2 * arguments.steps)
    rust_data = load_data(continued)
    measured = {
        "before": {
            "rust": bits_per_byte(trainer, rust_data, arguments.eval_tokens),
            "python": bits_per_byte(trainer, python_data, arguments.eval_tokens),
        }
    }
    for arm in ARMS:
        run = folder / arm
        shutil.copytree(first, run)
        config = continued.model_copy(deep=True)
        config.fire = FireConfig(enabled=arm != "none", trigger="phase", rewarm_steps=arguments.rewarm)
        trainer = Trainer(config, rust_data, run, quiet, resume=True)
        if arm in ("shrink-and-perturb", "reset"):
            (fire,) = (part for part in trainer.state.parts if isinstance(part, Fire))
            change_weights(trainer, fire, arm, seed)
        result = trainer.fit()
        early = next(e for e in result.progress.evaluations if e["step"] > arguments.steps)
        measured[arm] = {
            "rust": result.held_out.bits_per_byte,
            "early": early["bits_per_byte"],
            "python": bits_per_byte(trainer, python_data, arguments.eval_tokens),
        }
        print(f"seed {seed}  {arm:20s} {measured[arm]}", flush=True)
        shutil.rmtree(run)
    return measured


def judge(runs: list[dict[str, dict[str, float]]]) -> tuple[list[Result], list[Claim]]:
    """Medians and paired differences to `none`; ratio: none / arm, above 1 is better."""
    results, claims = [], []
    for arm in ("before", *ARMS):
        for key, metric in METRICS.items():
            if key not in runs[0][arm]:
                continue
            values = [run[arm][key] for run in runs]
            other = arm not in ("before", "none")
            ratio = statistics.median(run["none"][key] / run[arm][key] for run in runs) if other else None
            peer = "none" if other else None
            spread = (min(values), max(values))
            results.append(Result(arm, metric, statistics.median(values), "bits/byte", peer, ratio, values, spread))
            if other:
                differences = [run[arm][key] - run["none"][key] for run in runs]
                low, high = seed_interval(differences) or (differences[0], differences[0])
                mean = statistics.mean(differences)
                results.append(
                    Result(arm, f"{metric}, less none", mean, "bits/byte", runs=differences, spread=(low, high))
                )
                if key == "rust":
                    claims.append(
                        Claim(
                            f"plasticity-{arm}",
                            f"{arm} at the boundary ends with fewer bits per byte on Rust than doing nothing",
                            "arXiv:2602.08040" if arm == "fire" else "arXiv:1910.08475",
                            "< 0",
                            f"{mean:+.4f}",
                            "supported" if high < 0 else "not supported",
                            (low, high),
                            len(runs),
                        )
                    )
    return results, claims


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--steps", type=int, default=80, help="steps of each phase")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rewarm", type=int, default=10)
    parser.add_argument("--eval-tokens", type=int, default=8192)
    parser.add_argument("--max-bytes", type=int, default=12_000_000, help="bytes of each corpus")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("plasticity", arguments.out, quick=arguments.quick)
    torch.set_num_threads(arguments.threads)
    reporter = PlainReporter()
    limits = [f"data.max_bytes={arguments.max_bytes}", "data.val_fraction=0.05"]
    python = cached_dataset(resolve_config(["quickstart"], None, limits), reporter)
    rust_settings = [*limits, f"data.source={arguments.source.resolve()}", "data.glob=**/*.rs"]
    rust_settings.append(f"tokenizer.path={python / 'tokenizer.json'}")
    rust = cached_dataset(resolve_config(["quickstart"], None, rust_settings), reporter)
    runs = []
    for seed in range(1, arguments.seeds + 1):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(one_seed(arguments, seed, python, rust, Path(folder)))
        settings = {
            key: getattr(arguments, key)
            for key in ("steps", "layers", "batch_size", "rewarm", "threads", "eval_tokens", "set")
        }
        write_results(out, "plasticity", *judge(runs), seeds=seed, **settings)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
