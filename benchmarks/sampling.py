"""With which settings does a small model write text that looks like its corpus?

    python benchmarks/sampling.py RUN --data DATA           # a run, and the data set that it was trained on
    python benchmarks/sampling.py --seconds 1500 --data DATA    # trains the quickstart first

Prompts from held-out documents are continued with every setting, and by the documents themselves (the truth). Two
figures that the model cannot influence are compared with the truth's:

- repetition: the share of runs of four tokens of a continuation that occurred in it before (1 − distinct runs / runs;
  seq-rep-4 of arXiv:1908.04319). A loop is near 1; code repeats itself too, so 0 is not the aim.
- surprise: bits per byte under a byte n-gram model of the training documents (order 6, Witten–Bell), which shares only
  its training text with the model. Text that is too likely says nothing; gibberish is too surprising.

Human text is neither (arXiv:1904.09751, §4), so the best setting has the smallest departure from the truth: the larger
of both relative differences. Intervals resample prompts. All settings draw with the same seeds.
"""

import argparse
import math
import multiprocessing
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.formats.open import load_run
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig, generators, sample
from nanochat_cli.model.cache import KVCache
from nanochat_cli.report.result_file import Result, write_results
from nanochat_cli.report.statistics import bootstrap_interval
from nanochat_cli.training.samples import HeldOutPrompt, held_out_prompts

RESULT = Path(__file__).parent / "results" / "sampling.json"
RUN_LENGTH = 4
ORDER = 6
TRAINING_BYTES = 1_000_000
"""Training text of the n-gram model."""
PIECE = 2000


def settings() -> dict[str, SamplingConfig]:
    """Settings by name: a grid around the usual values."""
    grid: dict[str, SamplingConfig] = {"greedy": SamplingConfig(temperature=0)}
    plain = [{"temperature": t} for t in (0.7, 1.0)]
    top_k = [{"temperature": 0.7, "top_k": 50}]
    min_p = [{"temperature": t, "min_p": p} for t, p in ((0.7, 0.05), (0.8, 0.05), (1.0, 0.1))]
    penalty = [{"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1}]
    penalty += [{"temperature": 0.8, "min_p": 0.05, "repetition_penalty": 1.1}]
    for values in (*plain, *top_k, *min_p, *penalty):
        name = ", ".join(f"{key.replace('_', '-')} {value:g}" for key, value in values.items())
        grid[name] = SamplingConfig(**values)
    return grid


class ByteModel:
    """P(byte | the ORDER − 1 bytes before it), interpolated as Witten and Bell (1991, method C) do."""

    def __init__(self, text: bytes) -> None:
        self.counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for n in range(1, ORDER + 1)]
        self.followers: list[dict[bytes, tuple[int, int]]] = []
        for counts in self.counts:
            followers: dict[bytes, tuple[int, int]] = {}
            for gram, count in counts.items():
                total, kinds = followers.get(gram[:-1], (0, 0))
                followers[gram[:-1]] = total + count, kinds + 1
            self.followers.append(followers)

    def probability(self, context: bytes, byte: bytes) -> float:
        value = 1 / 256
        for n in range(ORDER):
            history = context[len(context) - n :] if n else b""
            total, kinds = self.followers[n].get(history, (0, 0))
            if total:
                value = (self.counts[n].get(history + byte, 0) + kinds * value) / (total + kinds)
        return value

    def bits_per_byte(self, prompt: bytes, text: bytes) -> float:
        whole, start = prompt + text, len(prompt)
        bits = [
            -math.log2(self.probability(whole[max(0, i - ORDER + 1) : i], whole[i : i + 1]))
            for i in range(start, len(whole))
        ]
        return math.fsum(bits) / len(bits)


def repetition(tokens: Sequence[int]) -> float:
    runs = [tuple(tokens[i : i + RUN_LENGTH]) for i in range(len(tokens) - RUN_LENGTH + 1)]
    return 1 - len(set(runs)) / len(runs)


@torch.no_grad()
def continuations(
    model: PackedTransformer, ids: list[int], how: Sequence[SamplingConfig], length: int, seed: int
) -> np.ndarray:
    """`length` tokens of each setting, int64 [S, length]; the end of a document is a token like any other."""
    cache = KVCache(model.config, 1, len(ids) + length, model.dtype, model.device)
    read = torch.tensor([ids], dtype=torch.int64)
    seen = torch.zeros(len(how), model.config.vocab_size, dtype=torch.bool)
    seen[:, ids] = True
    rows = [generators(seed, 1) for _ in how]
    drawn = []
    for step in range(length):
        logits = model.next_logits(read, cache).float()
        if step == 0:
            logits, cache = logits.expand(len(how), -1), cache.rows([0] * len(how))
        chosen = [sample(logits[i : i + 1], one, seen[i : i + 1], rows[i]) for i, one in enumerate(how)]
        read = torch.stack(chosen)
        seen.scatter_(1, read, True)
        drawn.append(read[:, 0])
    return torch.stack(drawn, dim=1).numpy()


def pieces(document: bytes) -> list[bytes]:
    """Whole lines, PIECE bytes or a little more each: a small corpus has fewer held-out documents than prompts."""
    parts, part = [], b""
    for line in document.splitlines(keepends=True):
        part += line
        if len(part) >= PIECE:
            parts.append(part)
            part = b""
    return parts


def training_text(documents: Iterable[bytes], most: int) -> bytes:
    text = bytearray()
    for document in documents:
        text += document
        if len(text) >= most:
            break
    return bytes(text[:most])


def trained(seconds: int, data: Path) -> Path:
    """Train the quickstart's model in `runs/sampling`, unless it is there already."""
    run = Path("runs/sampling")
    if not (run / "results.json").is_file():
        words = ["--preset", "quickstart", "--set", f"train.time_budget={seconds}", "--set", "run.name=sampling"]
        words += ["--set", f"data.path={data}"]
        subprocess.run([sys.executable, "-m", "nanochat_cli", "train", *words], check=True)
    return run


Figures = list[tuple[float, float]]
"""Repetition and surprise of each case on one prompt, the truth first."""


_JUDGE: list[ByteModel] = []
"""Made before the workers are forked, which share it: copying it would take longer than the work."""


def figures_of(run: Path, numbered: Sequence[tuple[int, HeldOutPrompt]], length: int) -> list[Figures]:
    model, tokenizer, _ = load_run(run)
    packed = PackedTransformer.from_model(model)
    figures = []
    for number, one in numbered:
        ids, truth = encode_prompt(tokenizer, one.prompt), tokenizer.encode(one.truth)[:length]
        if len(truth) == length:
            drawn = continuations(packed, ids, list(settings().values()), length, seed=number)
            texts = [tokenizer.decode(tokens).encode() for tokens in (truth, *drawn.tolist())]
            bits = [_JUDGE[0].bits_per_byte(one.prompt.encode(), text) for text in texts]
            figures.append([(repetition(t), b) for t, b in zip((truth, *drawn.tolist()), bits, strict=True)])
    return figures


def measure(run: Path, data: Path, count: int, length: int, workers: int) -> list[Result]:
    """Each worker takes a part of the prompts; what is drawn depends only on a prompt's number."""
    reader = ShardReader(data)
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    parts = [part for document in reader.documents("val") for part in pieces(document)]
    prompts = list(enumerate(held_out_prompts(parts, tokenizer, length * 2, count)))
    _JUDGE.append(ByteModel(training_text(reader.documents("train"), TRAINING_BYTES)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        tasks = [pool.submit(figures_of, run, prompts[i::workers], length) for i in range(workers)]
        rows = [row for task in tasks for row in task.result()]
    names = ("held-out text", *settings())
    return results({name: [row[place] for row in rows] for place, name in enumerate(names)})


def results(figures: dict[str, list[tuple[float, float]]]) -> list[Result]:
    """Means over prompts; departure: the larger of both relative differences from the truth."""
    truth = np.mean(figures["held-out text"], axis=0)
    listed = [Result("held-out text", "prompts", float(len(figures["held-out text"])), "prompts")]
    for name, values in figures.items():
        means = np.mean(values, axis=0)
        for place, (metric, unit) in enumerate((("repetition", "share"), ("surprise", "bits/byte"))):
            ends = bootstrap_interval([one[place] for one in values])
            listed.append(Result(name, metric, float(means[place]), unit, "held-out text", spread=ends))
        if name != "held-out text":
            resampled = _resampled_departures(values, figures["held-out text"])
            ends = tuple(float(end) for end in np.quantile(resampled, (0.025, 0.975)))
            value = float(np.max(np.abs(means - truth) / truth))
            listed.append(Result(name, "departure", value, "share", "held-out text", spread=(ends[0], ends[1])))
    return listed


def _resampled_departures(values: Sequence[tuple[float, float]], truth: Sequence[tuple[float, float]]) -> np.ndarray:
    ours, theirs = np.asarray(values), np.asarray(truth)
    drawn = np.random.default_rng(0).integers(len(ours), size=(2000, len(ours)))
    one, other = ours[drawn].mean(axis=1), theirs[drawn].mean(axis=1)
    return np.max(np.abs(one - other) / np.maximum(other, 1e-9), axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run; default: train the quickstart's model")
    parser.add_argument("--data", type=Path, required=True, help="the data set that the run was trained on")
    parser.add_argument("--seconds", type=int, default=1500, help="seconds of training, without a run")
    parser.add_argument("--prompts", type=int, default=110)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    run = arguments.run or trained(arguments.seconds, arguments.data)
    listed = measure(run, arguments.data, arguments.prompts, arguments.tokens, arguments.workers)
    best = min((one for one in listed if one.metric == "departure"), key=lambda one: one.value)
    command = "python benchmarks/sampling.py RUN --data DATA"
    write_results(arguments.out, "sampling", listed, command=command, run=run.name, tokens=arguments.tokens)
    print(f"closest to held-out text: {best.case} (departure {best.value:.3f})")


if __name__ == "__main__":
    main()
