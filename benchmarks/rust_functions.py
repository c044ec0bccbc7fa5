"""A corpus of short free functions from real crates, for the model that `benchmarks/grpo.py rust` starts from.

    python benchmarks/rust_functions.py FOLDER --corpus functions.jsonl

FOLDER holds unpacked crates, one per subfolder. Each function that needs no type or module around it is one document:
the first paragraph of its `///`, the signature, the body. Those that rustc accepts alone are written COPIES times,
since they look like the problems of `nanochat grpo`. Functions named like one of those problems are left out. Nothing
runs: rustc only checks (`--emit=metadata`).
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nanochat_cli.data.functions import Function, rust_functions
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.report.result_file import Result, result_place, write_results

COPIES = 6
BATCH = 2000
"""Functions that one call of rustc checks, each in a separate module."""
PASSES = 12
"""rustc stops at the first stage that finds errors, so the remaining functions are checked again."""


def collect(folder: Path, without: frozenset[str]) -> list[Function]:
    """Functions of all sources below `folder` in the order of their paths, each once, none named in `without`."""
    by_body: dict[str, Function] = {}
    for path in sorted(folder.rglob("*.rs"), key=str):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for function in rust_functions(text):
            by_body.setdefault(re.sub(r"\s+", " ", function.body), function)
    return [function for function in by_body.values() if function.name not in without]


def compiling(bodies: Sequence[str]) -> list[str]:
    """The bodies that rustc accepts alone, with nothing but the prelude."""
    accepted = []
    for start in range(0, len(bodies), BATCH):
        accepted += _accepted(bodies[start : start + BATCH])
        print(
            f"{start + len(bodies[start : start + BATCH])}/{len(bodies)} checked, {len(accepted)} compile", flush=True
        )
    return accepted


def _accepted(bodies: Sequence[str]) -> list[str]:
    live = dict(enumerate(bodies))
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for number, body in live.items():
            (work / f"m{number}.rs").write_text(body + "\n", encoding="utf-8")
        for _ in range(PASSES):
            (work / "lib.rs").write_text("".join(f"mod m{number};\n" for number in live), encoding="utf-8")
            wrong = _wrong(work)
            if wrong is None:
                return list(live.values())
            if not wrong & live.keys():
                break  # rustc does not say which module is wrong
            live = {number: body for number, body in live.items() if number not in wrong}
    if len(live) <= 1:
        return []
    rest = list(live.values())
    return _accepted(rest[: len(rest) // 2]) + _accepted(rest[len(rest) // 2 :])


def _wrong(work: Path) -> set[int] | None:
    """Numbers of the modules in which rustc finds an error; None when it accepts all."""
    flags = ["--edition", "2021", "--crate-type", "lib", "--emit=metadata", "--error-format=json", "-A", "warnings"]
    answer = subprocess.run(
        ["rustc", *flags, "-o", str(work / "x"), str(work / "lib.rs")], capture_output=True, text=True, timeout=300
    )
    if answer.returncode == 0:
        return None
    wrong: set[int] = set()
    for line in answer.stderr.splitlines():
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        if message["level"].startswith("error"):
            spans = [span for span in message["spans"] if span["is_primary"]] or message["spans"]
            names = [re.fullmatch(r"m(\d+)\.rs", Path(span["file_name"]).name) for span in spans]
            wrong |= {int(name[1]) for name in names if name}
    return wrong


def write(chosen: Sequence[Function], alone: frozenset[str], out: Path) -> int:
    """Write the documents in an order that depends only on their number; returns how many."""
    documents = [
        document for function in chosen for document in [function.document] * (COPIES if function.body in alone else 1)
    ]
    random.Random(0).shuffle(documents)
    out.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return len(documents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("rust_functions", arguments.out)
    if shutil.which("rustc") is None:
        parser.error("rustc was not found; install Rust (https://rustup.rs)")
    if not arguments.folder.is_dir():
        parser.error(f"{arguments.folder}: no such folder")
    problems = "\n".join(problem.prompt for problem in load_problems("rust"))
    chosen = collect(arguments.folder, frozenset(re.findall(r"\bfn (\w+)", problems)))
    alone = compiling([function.body for function in chosen])
    documents = write(chosen, frozenset(alone), arguments.corpus)
    case = "Rust crates"
    results = [
        Result(case, "crates", len(list(arguments.folder.glob("*/Cargo.toml"))), "crates"),
        Result(case, "free functions", len(chosen), "functions"),
        Result(case, "free functions that compile alone", len(alone), "functions"),
        Result(case, "documents", documents, "documents"),
        Result(case, "corpus", arguments.corpus.stat().st_size, "B"),
    ]
    print(f"wrote {arguments.corpus} and {write_results(out, 'rust_functions', results)}")


if __name__ == "__main__":
    main()
