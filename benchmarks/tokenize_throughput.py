"""How fast `nanochat tokenize` encodes, against the tokenizers library itself, and whether its memory stays flat.

    python benchmarks/tokenize_throughput.py [--quick]

Ours is the whole encoding stage of `prepare_dataset`: starting the workers, reading and hashing the files, encoding,
writing and syncing the shards. The peer gets all texts in memory as one list, and its result is dropped. Same
tokenizer, documents and cores, alternating; the figure is the median. Peak memory is that of a fresh process (and of
its largest worker) on a corpus of one and of four copies of the text.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as Backend

from nanochat_cli.config.schema import Config
from nanochat_cli.data.corpus import open_corpus
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.report.environment import usable_cores
from nanochat_cli.report.reporter import Progress, QuietReporter
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results

VOCAB_SIZE = 4096
QUICK_BYTES = 6_000_000
QUICK_MEMORY_BYTES = 4_500_000  # enough for two workers
MEMORY_BYTES = 12_000_000

PEAK_MEMORY = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
from nanochat_cli.bench.peak_memory import peak_memory
from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import prepare_dataset
from nanochat_cli.report.reporter import QuietReporter

class WorkerPeaks(QuietReporter):
    largest = 0

    def advance(self, n=1):
        children = Path("/proc/thread-self/children").read_text().split()
        self.largest = max([self.largest, *map(peak_memory, children)])

    @contextmanager
    def progress(self, description, total=None, unit=""):
        yield self

if __name__ == "__main__":
    reporter = WorkerPeaks()
    prepare_dataset(sys.argv[1], Path(sys.argv[2]), Config.model_validate_json(sys.argv[3]), reporter)
    print(json.dumps([peak_memory(), reporter.largest]))
"""


class StageTimes(QuietReporter):
    """Seconds of every stage that shows progress."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def progress(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
        start = time.perf_counter()
        with super().progress(description, total, unit) as progress:
            yield progress
        self.seconds[description] = time.perf_counter() - start


def make_config(tokenizer: Path | None = None, max_bytes: int | None = None) -> Config:
    return Config.model_validate(
        {"model": {"vocab_size": VOCAB_SIZE}, "tokenizer": {"path": tokenizer}, "data": {"max_bytes": max_bytes}}
    )


def measure_throughput(folder: Path, tokenizer: Path, max_bytes: int | None, repeats: int) -> list[Result]:
    """Encode the same documents with every contender, alternating; MB of text per second."""
    texts: list[str] = []
    size = 0
    for document in open_corpus("stdlib"):
        texts.append(document.content.decode())
        size += len(document.content)
        if max_bytes is not None and size >= max_bytes:
            break
    backend = Backend.from_file(str(tokenizer))

    def ours(turn: int) -> float:
        times = StageTimes()
        manifest = prepare_dataset("stdlib", folder / str(turn), make_config(tokenizer, max_bytes), times)
        if manifest.train.bytes + manifest.val.bytes != size:
            raise RuntimeError("the contenders did not encode the same documents")
        return times.seconds["encoding"]

    def timed(encode: Callable[[list[str]], object]) -> float:
        start = time.perf_counter()
        encode(texts)
        return time.perf_counter() - start

    contenders: dict[str, Callable[[int], float]] = {
        "nanochat": ours,
        "tokenizers encode_batch": lambda _: timed(backend.encode_batch),
        "tokenizers encode_batch_fast": lambda _: timed(backend.encode_batch_fast),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, run in contenders.items():
            speeds[name].append(size / run(turn) / 1e6)
            print(f"turn {turn + 1}/{repeats}: {name}: {speeds[name][-1]:.2f} MB/s", flush=True)
    case = f"stdlib, {size / 1e6:.1f} MB, vocabulary {VOCAB_SIZE}, {usable_cores()} cores"
    return [
        summarise(case, "encoding speed", "MB/s", speeds["nanochat"], peer=name, peer_runs=runs)
        for name, runs in speeds.items()
        if name != "nanochat"
    ]


def measure_memory(folder: Path, tokenizer: Path, size: int) -> list[Result]:
    """Peak resident bytes of preparing one and four copies of the same text, tokenizer given."""
    script = folder / "peak_memory.py"
    script.write_text(PEAK_MEMORY)
    lines: list[str] = []
    total = 0
    for document in open_corpus("stdlib"):
        lines.append(json.dumps({"text": document.content.decode()}) + "\n")
        total += len(document.content)
        if total >= size:
            break
    peaks: dict[int, list[int]] = {}
    for copies in (1, 4):
        corpus = folder / f"{copies}.jsonl"
        with corpus.open("w") as file:
            for _ in range(copies):
                file.writelines(lines)
        command = [sys.executable, str(script), str(corpus), str(folder / f"memory-{copies}")]
        command.append(make_config(tokenizer).model_dump_json())
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        peaks[copies] = json.loads(ran.stdout)
        print(f"{copies} × {total / 1e6:.1f} MB: peak {[round(peak / 1e6) for peak in peaks[copies]]} MB", flush=True)
    return [
        summarise(
            f"{process}, {4 * total / 1e6:.1f} MB of text",
            "peak resident memory",
            "MB",
            [peaks[4][index] / 1e6],
            peer=f"the same on {total / 1e6:.1f} MB of text",
            peer_runs=[peaks[1][index] / 1e6],
            smaller_is_better=True,
        )
        for index, process in enumerate(("main process", "largest worker"))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a part of the corpus: under a minute")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained = prepare_dataset("stdlib", folder / "trained", make_config(max_bytes=QUICK_BYTES), QuietReporter())
        tokenizer = folder / "trained" / "tokenizer.json"
        print(f"tokenizer: {trained.tokenizer.vocab_size} tokens", flush=True)
        limit = QUICK_BYTES if options.quick else None
        results = measure_throughput(folder, tokenizer, limit, options.repeats)
        results += measure_memory(folder, tokenizer, QUICK_MEMORY_BYTES if options.quick else MEMORY_BYTES)
    write_results(result_place("tokenize", options.out, quick=options.quick), "tokenize", results)
    for result in results:
        print(f"{result.metric}, {result.case}: {result.value:.4g} {result.unit}, {result.ratio:.3f} × {result.peer}")


if __name__ == "__main__":
    main()
