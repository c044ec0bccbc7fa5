"""Peak memory of the chunked cross-entropy against the plain one, each in a fresh process.

    python benchmarks/loss_memory.py

4096 tokens, a vocabulary of 32768, forward and backward; the growth of the process beyond its inputs.
"""

import argparse
import statistics
from pathlib import Path

from nanochat_cli.bench.peak_memory import peak_growth
from nanochat_cli.report.result_file import Result, result_place, write_results

RUNS = 5
SETUP = """
import torch
from nanochat_cli.training.losses import chunked_cross_entropy, cross_entropy
hidden = torch.randn(4096, 64, requires_grad=True)
unembedding = torch.randn(32768, 64, requires_grad=True)
targets = torch.randint(0, 32768, (4096,))
"""
FORMS = {"chunked": "chunked_cross_entropy", "plain": "cross_entropy"}


def peak_bytes(form: str) -> int:
    """Growth of the resident set, in a fresh process."""
    return peak_growth(SETUP, f"{FORMS[form]}(hidden, unembedding, targets)[0].backward()")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("memory", arguments.out)
    runs: dict[str, list[float]] = {"chunked": [], "plain": []}
    for _ in range(RUNS):
        for form, peaks in runs.items():
            peaks.append(peak_bytes(form))
    case = "cross-entropy, 4096 tokens, vocabulary 32768, chunks of 512"
    plain, chunked = (statistics.median(runs[form]) for form in ("plain", "chunked"))
    results = [
        Result(case, "peak memory", chunked, "B", "plain cross-entropy", plain / chunked, runs["chunked"]),
        Result(f"{case}: plain", "peak memory", plain, "B", runs=runs["plain"]),
    ]
    print(f"plain {plain / 1e6:.0f} MB, chunked {chunked / 1e6:.0f} MB")
    print(f"wrote {write_results(out, 'memory', results)}")


if __name__ == "__main__":
    main()
