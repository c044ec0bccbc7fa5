"""Fine-tuning of the quickstart model on instructions: does it learn to answer, and what does it forget?

    python benchmarks/sft.py                                # trains a base model, then tunes it with 3 seeds
    python benchmarks/sft.py --quick --work DIR             # a minute: whether it works here, no figures

The instructions are made from the standard library, without a download: 300 functions, asked for by their names and
answered by the first sentence of their docstrings. Each seed tunes the same base model twice, with a tenth of the rows
from the text that the base model was trained on and without. Measured are the loss of held-out answers, before and
after, and the bits per byte of held-out text. Finished runs are not repeated.
"""

import argparse
import ast
import inspect
import json
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_cli.report.result_file import Result, result_place, write_results

ROOT = Path(__file__).resolve().parents[1]
ROWS = 300
MIXES = (0.1, 0.0)
MEASURES = {
    "loss of held-out answers": ("final/loss", "nats per token"),
    "bits per byte of text": ("final/base_bits_per_byte", "bits/byte"),
}
"""Metric → its name in metrics.jsonl at the end of a run, and the unit."""
QUICK = (
    *("model.dim=64", "model.n_layers=1", "model.n_heads=2", "model.n_kv_heads=2", "model.ffn_dim=64"),
    *("data.max_bytes=200000", "train.compile=off", "model.vocab_size=512"),
)


def instructions(count: int = ROWS) -> list[dict[str, str]]:
    """Rows of prompt and completion from the standard library, in the order of its files; deterministic."""
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for name, sentence in _documented(path.read_text(encoding="utf-8", errors="replace")):
            asked = f"What does {path.stem}.{name} of Python's standard library do?"
            rows.setdefault(sentence, {"prompt": asked, "completion": sentence})  # no answer twice
    found = list(rows.values())
    return [found[len(found) * i // count] for i in range(count)] if len(found) > count else found


def _documented(source: str) -> Iterator[tuple[str, str]]:
    """Public functions at the top of a file, with the first sentence of their docstrings."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = inspect.cleandoc(ast.get_docstring(node) or "").partition("\n\n")[0].replace("\n", " ")
            sentence = text.partition(". ")[0].rstrip(".")
            if 20 <= len(sentence) <= 200:
                yield node.name, f"{sentence}."


def command(work: Path, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "nanochat_cli", *arguments], cwd=work, check=True)


def keys(*values: str) -> list[str]:
    return [word for value in values for word in ("--set", value)]


def name_of(mix: float, seed: int) -> str:
    return f"sft-mix-{mix:g}-seed-{seed}"


def train_all(work: Path, arguments: argparse.Namespace) -> None:
    """The base model, both data sets and every tuned model that is not there yet."""
    small = QUICK if arguments.quick else ()
    if not (work / "data" / "base" / "manifest.json").is_file():
        command(
            work,
            "tokenize",
            "--out",
            "data/base",
            *keys(*(key for key in small if key.startswith(("data.", "model.vocab")))),
        )
    if not (work / "runs" / "base" / "results.json").is_file():
        settings = ["data.path=data/base", "run.name=base", f"train.time_budget={arguments.seconds:g}"]
        own = [key for key in small if not key.startswith(("data.", "model.vocab"))]
        command(work, "train", "--preset", "quickstart", *keys(*settings, *own))
    if not (work / "data" / "chat" / "manifest.json").is_file():
        lines = (json.dumps(row) + "\n" for row in instructions())
        (work / "chat.jsonl").write_text("".join(lines), encoding="utf-8")
        told = ["--chat", "--tokenizer", "runs/base", "--out", "data/chat"]
        command(work, "tokenize", "--source", "chat.jsonl", *told, *keys("data.val_fraction=0.1"))
    for seed in range(1, arguments.seeds + 1):
        for mix in MIXES:
            name = name_of(mix, seed)
            if not (work / "runs" / name / "results.json").is_file():
                settings = ["data.path=data/chat", "data.base=data/base", "train.init=runs/base", f"train.mix={mix:g}"]
                settings += [f"run.name={name}", f"run.seed={seed}", "train.time_budget=none", "train.compile=off"]
                settings += [f"train.total_steps={arguments.steps}", f"eval.interval={max(1, arguments.steps // 8)}"]
                command(work, "train", "--preset", "sft", *keys(*settings))


def collect(work: Path, seeds: int) -> list[Result]:
    """Per mix and measure: the median over seeds after tuning, and the value of the base model."""
    before = json.loads((work / "before.json").read_text(encoding="utf-8"))
    results = []
    for mix in MIXES:
        records = [_records(work / "runs" / name_of(mix, seed)) for seed in range(1, seeds + 1)]
        case = f"quickstart, {ROWS} instructions, mix {mix:g}"
        for measure, (final, unit) in MEASURES.items():
            values = [next(one[final] for one in reversed(lines) if final in one) for lines in records]
            spread = (min(values), max(values))
            results.append(
                Result(case, f"{measure}, after", statistics.median(values), unit, runs=values, spread=spread)
            )
            results.append(Result(case, f"{measure}, before", before[measure], unit))
    return results


def _records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def measure_base(work: Path) -> None:
    """The base model on both data sets, in before.json."""
    if (work / "before.json").is_file():
        return
    found = {}
    for measure, data, key in (
        ("loss of held-out answers", "data/chat", "loss"),
        ("bits per byte of text", "data/base", "bits_per_byte"),
    ):
        command(work, "eval", "runs/base", "--suite", "bpb", "--data", data, "--json", "eval.json")
        found[measure] = json.loads((work / "eval.json").read_text(encoding="utf-8"))[key]
    (work / "before.json").write_text(json.dumps(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps, one seed")
    parser.add_argument("--seconds", type=float, default=300.0, help="seconds of training of the base model")
    parser.add_argument("--steps", type=int, default=200, help="steps of fine-tuning")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "sft", help="folder of data sets and runs")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/sft.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seconds, arguments.steps, arguments.seeds = 5.0, 8, 1
    arguments.work.mkdir(parents=True, exist_ok=True)
    train_all(arguments.work, arguments)
    measure_base(arguments.work)
    results = collect(arguments.work, arguments.seeds)
    for one in results:
        print(f"{one.case}: {one.metric} {one.value:.4f} {one.unit}")
    out = result_place("sft", arguments.out, quick=arguments.quick)
    print(f"wrote {write_results(out, 'sft', results)}")


if __name__ == "__main__":
    main()
