"""Do the three modes of `nanochat grpo` make a small model write more programs that compile and pass?

    python benchmarks/grpo.py python                        # from the standard library
    python benchmarks/grpo.py rust --source FOLDER          # unpacked crates, or the corpus of rust_functions.py
    python benchmarks/grpo.py --collect                     # only the result file, from finished runs

The committed Rust model: `rust --source functions.jsonl --seconds 3900 --threads 2 --max-tokens 64`.

Trains a model of the quickstart's size, then starts each mode from it, with the commands that a person would type.
Finished steps are not repeated, so that an interrupted script continues. Before and after draw the same number of
completions of the same problems with the same random numbers; differences are paired by problem, and their 95 %
bootstrap intervals resample problems.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import tomlkit

from nanochat_cli.report.result_file import Result, write_results
from nanochat_cli.rl.evaluation_pair import ProblemScore, Scores, differences

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ("python", "rust")
MODES = ("policy", "rft", "training-free")
TRAINING = (
    "train.seq_len=512",
    "model.max_seq_len=512",
    "train.batch_size=4",
    "eval.interval=400",
    "checkpoint.interval=400",
)
TRAINED = {
    "held-out bits per byte": ("bits_per_byte", "bits/byte"),
    "training": ("training_seconds", "s"),
    "training tokens": ("training_tokens", "tokens"),
}
"""Metrics of the model that the modes start from: keys of its results, and units."""
EVALUATED = ("policy", "rft")
"""Modes that change weights, so that `nanochat eval` can measure them, at a lower temperature too."""
EVALUATION = ("--samples", "8", "--temperature", "0.2,0.8", "--max-tokens", "64")


def command(work: Path, *arguments: str, threads: int = 1) -> None:
    """Run `nanochat ARGUMENTS` in `work`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run([sys.executable, "-m", "nanochat_cli", *arguments], cwd=work, env=environment, check=True)


def keys(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def run_language(language: str, arguments: argparse.Namespace) -> None:
    work: Path = arguments.work
    source = [] if arguments.source is None else [f"data.source={arguments.source.resolve()}"]
    if language == "rust":
        source.append("data.glob=**/*.rs")
    if not (work / "runs" / language / "results.json").is_file():
        settings = [f"run.name={language}", f"train.time_budget={arguments.seconds}", *TRAINING, *source]
        command(work, "train", "--preset", "quickstart", *keys(*settings), threads=arguments.threads)
    for mode in arguments.modes:
        if not (work / "runs" / f"{language}-{mode}" / "grpo.json").is_file():
            settings = [f"grpo.eval_samples={arguments.eval_samples}", f"grpo.max_tokens={arguments.max_tokens}"]
            words = ["--task", language, "--mode", mode, "--rounds", str(arguments.rounds)]
            words += ["--group", str(arguments.group), "--out", f"runs/{language}-{mode}"]
            command(work, "grpo", f"runs/{language}", *words, *keys(*settings))
    for name in (language, *(f"{language}-{mode}" for mode in arguments.modes if mode in EVALUATED)):
        if not list((work / "runs" / name / "eval").glob("*/results.json")):
            command(work, "eval", f"runs/{name}", "--suite", language, *EVALUATION)


def scores(saved: dict[str, Any]) -> Scores:
    return {problem: ProblemScore(**values) for problem, values in saved.items()}


def results_of(language: str, mode: str, run: Path) -> tuple[list[Result], dict[str, Any]]:
    """Figures over all problems, the practised and the held-out ones; and the run's settings and rounds."""
    saved = json.loads((run / "grpo.json").read_text(encoding="utf-8"))
    before, after = scores(saved["before"]), scores(saved["after"])
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = {one["problems"]: one["count"] for one in saved["differences"]}
    ids = list(before)  # the practised first (`run_grpo`)
    sets = {"all": ids, "practised": ids[: counts["practised"]], "held out": ids[counts["practised"] :]}
    case = f"{language}, {mode}"
    results = [Result(case, "rounds", len(metrics), "rounds")]
    for one in differences(sets, before, after):
        name = f"{one.measure}, {one.problems}"
        results += [
            Result(case, f"{name}, before", one.before, "share", spread=one.before_interval),
            Result(case, f"{name}, after", one.after, "share", spread=one.after_interval),
            Result(case, f"{name}, change", one.difference, "share", spread=one.difference_interval),
        ]
    samples = {side: sum(one.samples for one in of.values()) for side, of in (("before", before), ("after", after))}
    results += [Result(case, f"completions {side}", count, "completions") for side, count in samples.items()]
    settings = tomlkit.parse((run / "config.toml").read_text(encoding="utf-8"))["grpo"].unwrap()
    details = {key: saved[key] for key in ("environment", "before", "after")}
    return results, {"settings": settings, "rounds": metrics, **details}


def evaluated(run: Path) -> list[Result]:
    """The results of `nanochat eval` over all problems."""
    results = []
    for path in sorted((run / "eval").glob("*/results.json")):
        for one in json.loads(path.read_text(encoding="utf-8"))["results"]:
            if "level" not in one["case"]:
                case = f"{run.name}, nanochat eval, {one['case']}"
                results.append(Result(case, one["metric"], one["value"], one["unit"], spread=one["spread"]))
    return results


def collect(work: Path, out: Path) -> None:
    results: list[Result] = []
    runs: dict[str, Any] = {}
    for language in LANGUAGES:
        start = work / "runs" / language
        if not (start / "results.json").is_file():
            continue
        trained = json.loads((start / "results.json").read_text(encoding="utf-8"))
        results += [
            Result(f"{language}, trained", metric, trained["results"][key], unit)
            for metric, (key, unit) in TRAINED.items()
        ]
        for mode in MODES:
            run = work / "runs" / f"{language}-{mode}"
            if (run / "grpo.json").is_file():
                of_mode, runs[f"{language}-{mode}"] = results_of(language, mode, run)
                results += of_mode
        for name in (language, *(f"{language}-{mode}" for mode in EVALUATED)):
            results += evaluated(work / "runs" / name)
    print(f"wrote {write_results(out, 'grpo', results, runs=runs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=LANGUAGES, nargs="?")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--source", type=Path)
    parser.add_argument("--seconds", type=float, default=2700.0, help="seconds of training")
    parser.add_argument("--threads", type=int, default=1, help="threads of training; everything else uses one")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--eval-samples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=48, help="tokens of a completion, in and around rounds")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "grpo")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "grpo.json")
    arguments = parser.parse_args()
    if (arguments.language is None) == (not arguments.collect):
        parser.error("name a language or give --collect")
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.language is not None:
        run_language(arguments.language, arguments)
    collect(arguments.work, arguments.out)


if __name__ == "__main__":
    main()
