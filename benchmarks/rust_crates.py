"""The whole chain on real Rust crates: tokenize, train for ten minutes on the CPU, export, llama.cpp.

    python benchmarks/rust_crates.py FOLDER [--seconds 600]

FOLDER holds unpacked crates (for example from Debian's librust-*-dev packages). Every step is the command that a person
would type. Held-out documents are compared byte for byte after decoding, which shows that newlines survive, and their
tokens in llama.cpp with ours.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from nanochat_cli.data.shards import ShardReader
from nanochat_cli.export import llama_cpp
from nanochat_cli.report.result_file import Result, result_place, write_results

ROOT = Path(__file__).parent.parent
PROMPTS = ("fn main() {\n", "impl fmt::Display for Error {\n", "use std::")


def command(work: Path, *arguments: str) -> dict[str, Any]:
    """Run nanochat in `work` and return its --json result."""
    answer = work / "answer.json"
    subprocess.run([sys.executable, "-m", "nanochat_cli", *arguments, "--json", str(answer)], cwd=work, check=True)
    return json.loads(answer.read_text(encoding="utf-8"))


def newlines_survive(reader: ShardReader, gguf: Path, documents: int = 20) -> int:
    """Check that llama.cpp splits held-out documents into our tokens, which decode to their bytes; returns how many."""
    texts = [document.decode() for document, _ in zip(reader.documents("val"), range(documents), strict=False)]
    theirs = llama_cpp.tokenize(gguf, texts)
    for text, tokens in zip(texts, theirs, strict=True):
        assert "\n" in text, "a source file without a line end proves nothing"
        assert tokens == reader.tokenizer.encode(text), "llama.cpp splits a document differently"
        assert reader.tokenizer.decode(tokens) == text, "a document changed on the way through its tokens"
    return len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "rust")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("rust", arguments.out)
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    source = str(arguments.source.resolve())
    data = command(work, "tokenize", "--source", source, "--glob", "**/*.rs", "--out", "data", "--vocab-size", "4096")
    budget = ["--set", f"train.time_budget={arguments.seconds}", "--set", "data.path=data"]
    trained = command(work, "train", "--preset", "quickstart", *budget)
    run = work / trained["run"]
    exported = command(work, "export", str(run), "--gguf")
    reader = ShardReader(work / "data")
    checked = newlines_survive(reader, run / "model.gguf")
    samples = {prompt: llama_cpp.llama_cpp_generate(run / "model.gguf", prompt, 64) for prompt in PROMPTS}
    for prompt, text in samples.items():
        print(f"--- llama.cpp\n{prompt}{text}")
    own = trained["held_out"]["bits_per_byte"]
    case = "Rust crates"
    results = [
        Result(case, "corpus", data["train"]["bytes"] + data["val"]["bytes"], "B"),
        Result(case, "documents", data["train"]["documents"] + data["val"]["documents"], "documents"),
        Result(case, "training", trained["progress"]["seconds"], "s"),
        Result(case, "training tokens", trained["progress"]["tokens"], "tokens"),
        Result(case, "held-out documents that llama.cpp splits into our tokens", checked, f"of {checked}"),
        Result(case, "held-out bits per byte, ours", own, "bits/byte"),
    ]
    results += [
        Result(case, "held-out bits per byte", value, "bits/byte", peer=name, ratio=value / own)
        for name, value in trained["baselines"].items()
    ]
    print(f"wrote {write_results(out, 'rust', results, verification=exported['verify'], samples=samples)}")


if __name__ == "__main__":
    main()
