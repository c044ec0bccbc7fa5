"""Forms of token filtering and of multi-token prediction: bits per byte after the same steps, and what they save.

    python benchmarks/method_forms.py [--steps 100] [--seeds 2] [--cases CASE …] [--out FILE]

The preset `quickstart`, each run an ordinary run of the trainer in a process and one thread of its own; all cases of a
seed have the same initial weights. Steps are matched and time is not measured, so a busy machine changes nothing. What
a form saves is counted:

    backward rows   mean share of the tokens in the backward pass
    rows ahead      predictions of tokens further ahead, per token
    token work      model FLOPs of a run over those of a plain one: all that depends on how many tokens there are

Smaller batches, `three quarters of the rows` and `half of the rows`, are what filtering has to beat: they save work and
need no method. `a tenth more steps` is what more work buys without one. Differences are paired by seed; the interval is
their range.

The plain run also says what any choice of rows could be worth at its end. With g the norm of a token's gradient at the
logits, a row kept with the chance p = min(1, g / τ) and weighted by 1 / p leaves the share Σ g² / Σ (g² / p) of what a
noisy gradient tells (arXiv:1803.00942) and costs 1/3 + 2/3 · mean p. `best choice of rows` is the largest ratio of the
two over τ: above it no filter by the prediction alone can be worth in steps what it saves.

A file that exists is continued: runs that it has are not repeated. Stop and start again at any time.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import MTPConfig
from nanochat_cli.report.result_file import Result, result_place, write_results
from nanochat_cli.training.flops import training_flops_per_token

FILTER = ["collider.enabled=true", "collider.sparsity=0.35"]
AHEAD = ["mtp.enabled=true", "mtp.kind=heads"]
CASES: dict[str, list[str]] = {
    "plain": [],
    "three quarters of the rows": ["train.batch_size=6"],
    "half of the rows": ["train.batch_size=4"],
    "a tenth more steps": [],
    "filter": FILTER,
    "heads": AHEAD,
    "heads, one row in 4": [*AHEAD, "mtp.every=4"],
    "heads, fading by half": [*AHEAD, "mtp.fade=0.5"],
    "one head, one row in 4, fading by half": [*AHEAD, "mtp.n_tokens=1", "mtp.every=4", "mtp.fade=0.5"],
}
"""What is laid over the preset. The first is the peer of the others."""
STEPS = {"a tenth more steps": 1.1}
UNITS = {"bits_per_byte": "bits/byte", "backward": "share", "ahead": "rows/token"}
METRICS = {"bits_per_byte": "held-out bits per byte", "backward": "backward rows", "ahead": "rows ahead"}


def overrides(arguments: argparse.Namespace, case: str, seed: int) -> list[str]:
    """`--set` of a run; everything that is written while it trains is left out."""
    never = 10 * arguments.steps
    steps = round(arguments.steps * STEPS.get(case, 1.0))
    fixed = [f"run.seed={seed}", f"train.total_steps={steps}", "train.time_budget=none", "train.compile=off"]
    fixed += [f"eval.interval={never}", f"checkpoint.interval={never}", "telemetry.tensorboard=false"]
    fixed += ["train.log_interval=1", "eval.final_max_tokens=65536"]
    return [*fixed, *CASES[case], *arguments.set]


def one_run(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains one case, in the child process."""
    import torch

    from nanochat_cli.data.prepare import cached_dataset
    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.report.reporter import PlainReporter, QuietReporter
    from nanochat_cli.training.shard_data import ShardData
    from nanochat_cli.training.trainer import Trainer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = resolve_config(["quickstart"], None, overrides(arguments, arguments.one, arguments.seed))
        reader = ShardReader(cached_dataset(config, PlainReporter()), vocab_size=config.model.vocab_size)
        data = ShardData(reader, config)
        trainer = Trainer(config, data, Path(folder), QuietReporter())
        result = trainer.fit()
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss/main" in line]
        assert len(steps) == config.train.total_steps
        ahead = sum("loss/mtp_1" in line for line in steps) * config.mtp.n_tokens / config.mtp.every
        values = {
            "bits_per_byte": result.held_out.bits_per_byte,
            "backward": statistics.mean(line.get("collider/kept_fraction", 1.0) for line in steps),
            "ahead": ahead / len(steps),
        }
        if arguments.one == "plain":
            values |= best_choice(trainer.state.model.eval(), *data.batch(arguments.steps))
    return values


def best_choice(model: Any, inputs: Any, targets: Any) -> dict[str, float]:
    """What is left of a gradient over what it costs, for the best τ, and the share of rows that it keeps."""
    import torch

    with torch.no_grad():
        p = model.logits(model(inputs)).flatten(0, 1).softmax(dim=-1)
    picked = p.gather(1, targets.reshape(-1, 1)).squeeze(1)
    square = (p.square().sum(dim=1) - 2 * picked + 1).double()
    found = []
    for tau in torch.linspace(0.01, 1.5, 150):
        chance = (square.sqrt() / tau).clamp(min=1e-3, max=1)
        left, kept = square.sum() / (square / chance).sum(), chance.mean()
        found.append((float(left / (1 / 3 + 2 / 3 * kept)), float(kept)))
    worth, kept = max(found)
    learnt = float((picked.log() > -1).double().mean())
    return {"best choice of rows": worth, "rows kept by the best choice": kept, "tokens below one nat": learnt}


def token_work(case: str, values: dict[str, float]) -> float:
    """Model FLOPs of a run over those of a plain one."""
    plain, ours = (resolve_config(["quickstart"], None, CASES[name]) for name in ("plain", case))
    off = ours.model_copy(update={"mtp": MTPConfig()})
    trained = training_flops_per_token(off, values["backward"])
    ahead = training_flops_per_token(ours) - training_flops_per_token(off)
    active = values["ahead"] * ours.mtp.every / ours.mtp.n_tokens
    tokens = ours.train.batch_size / plain.train.batch_size * STEPS.get(case, 1.0)
    return tokens * (trained + active * ahead) / training_flops_per_token(plain)


def judge(runs: dict[str, dict[str, dict[str, float]]]) -> list[Result]:
    """runs: case → seed → values. Differences less plain, in total and per share of the work that is saved."""
    results = []
    plain = runs["plain"]
    for case, of_seeds in runs.items():
        paired = [(values, plain[seed]) for seed, values in of_seeds.items() if seed in plain]
        if not paired:
            continue
        results.append(Result(case, "seeds", len(paired), "runs"))
        for key, metric in METRICS.items():
            results.append(result(case, metric, UNITS[key], [ours[key] for ours, _ in paired]))
        work = [token_work(case, ours) for ours, _ in paired]
        results.append(result(case, "token work", "×", work))
        if case == "plain":
            more = [key for key in next(iter(of_seeds.values())) if key not in METRICS]
            for key in more:
                unit = "×" if key.startswith("best") else "share"
                results.append(result(case, key, unit, [values[key] for values in of_seeds.values()]))
            continue
        lost = [ours["bits_per_byte"] - theirs["bits_per_byte"] for ours, theirs in paired]
        results.append(result(case, "held-out bits per byte, less plain", "bits/byte", lost))
        if max(work) < 1:
            per_share = [difference / (1 - share) for difference, share in zip(lost, work, strict=True)]
            results.append(result(case, "bits per byte lost per share of the work saved", "bits/byte", per_share))
    return results


def result(case: str, metric: str, unit: str, values: list[float]) -> Result:
    """Mean of the seeds with their range."""
    return Result(case, metric, statistics.mean(values), unit, runs=values, spread=(min(values), max(values)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one_run(arguments)))
        return
    out = result_place("method_forms", arguments.out)
    runs: dict[str, dict[str, dict[str, float]]] = {}
    if out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        if (before["steps"], before["set"]) != (arguments.steps, arguments.set):
            parser.error(f"{out} has runs of {before['steps']} steps and --set {before['set']}")
        runs = before["runs"]
    for seed in map(str, range(1, arguments.seeds + 1)):
        for case in dict.fromkeys(("plain", *arguments.cases)):
            if seed in runs.get(case, {}):
                continue
            command = [sys.executable, __file__, "--one", case, "--seed", seed, "--steps", str(arguments.steps)]
            command += [part for value in arguments.set for part in ("--set", value)]
            finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            values = json.loads(finished.stdout.strip().splitlines()[-1])
            runs.setdefault(case, {})[seed] = values
            print(f"seed {seed}  {case:45s} {json.dumps(values)}", flush=True)
            write_results(out, "method_forms", judge(runs), steps=arguments.steps, set=arguments.set, runs=runs)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
