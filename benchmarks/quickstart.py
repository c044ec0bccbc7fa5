"""`make quickstart` on a fresh clone in an empty virtual environment, timed; its figures as a result file.

    python benchmarks/quickstart.py [--keep FOLDER]

Nothing of an earlier run is reused but pip's download cache: the corpus is tokenized and every kernel compiled again.
--keep gets the transcript and the picture of the curve.
"""

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from nanochat_cli.report.result_file import Result, result_place, write_results

ROOT = Path(__file__).parent.parent


def run_clean(folder: Path, transcript: Path) -> tuple[Path, float]:
    """Clone and make quickstart; returns the run's folder and the seconds that make took."""
    clone = folder / "nanochat"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    environment |= {"NANOCHAT_CACHE": str(folder / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    started = time.perf_counter()
    with transcript.open("w", encoding="utf-8") as out:
        subprocess.run(
            ["make", "quickstart"], cwd=clone, env=environment, stdout=out, stderr=subprocess.STDOUT, check=True
        )
    return clone / "runs" / "quickstart-1", time.perf_counter() - started


def figures(run: Path, seconds: float) -> list[Result]:
    document = json.loads((run / "results.json").read_text(encoding="utf-8"))
    results, baselines = document["results"], document["baselines"]
    own = results["bits_per_byte"]
    case = "quickstart"
    figures = [
        Result(case, "make quickstart, installation included", seconds, "s"),
        Result(case, "training", results["training_seconds"], "s"),
        Result(case, "training tokens", results["training_tokens"], "tokens"),
        Result(case, "training rate", results["tokens_per_second"], "tokens/s"),
        Result(case, "utilisation of the SGEMM peak", results["utilisation"], "share"),
        Result(case, "parameters", document["parameters"]["total"], "parameters"),
        Result(case, "size of the GGUF file", (run / "model.gguf").stat().st_size, "B"),
        Result(case, "held-out bits per byte, ours", own, "bits/byte"),
    ]
    figures += [
        Result(case, "held-out bits per byte", value, "bits/byte", peer=name, ratio=value / own)
        for name, value in baselines.items()
    ]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "quickstart")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("quickstart", arguments.out)
    arguments.keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="nanochat-quickstart-") as folder:
        run, seconds = run_clean(Path(folder), arguments.keep / "transcript.txt")
        for name in ("curve.png", "report.md", "results.json", "metrics.jsonl"):
            shutil.copy(run / name, arguments.keep / name)
        results = figures(run, seconds)
    for result in results:
        print(f"{result.metric}: {result.value:.5g} {result.unit} {result.peer or ''}")
    print(f"wrote {write_results(out, 'quickstart', results)}")


if __name__ == "__main__":
    main()
