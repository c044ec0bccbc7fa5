"""Greedy decoding with a run's multi-token prediction as the drafter, against plain decoding of the same model.

    python benchmarks/speculative.py [--quick] [--steps 100] [--drafts 1 3]

Trains the preset quickstart with `mtp.kind` heads and nextn on 512 tokens per step, then continues 50 beginnings of
held-out text with the packed runtime on one thread. For every prompt, plain decoding, the same passes without drafts,
and drafted decoding alternate; prompts with equal tokens are counted. Plain decoding of one token is a single call of
compiled code, a pass over several tokens is not: the second peer shows what drafts alone are worth. Acceptance depends
on the text: a model with so little training repeats itself, which is easy to guess.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanochat_cli.config.load import load_run_config
from nanochat_cli.formats.open import load_mtp, load_run
from nanochat_cli.formats.run.dataset import open_run_data
from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.speculative import Acceptance, Drafter, make_drafter, speculate_tokens
from nanochat_cli.report.reporter import PlainReporter
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results

KINDS = {"heads": 3, "nextn": 1}
"""Tokens ahead that each kind is trained on; nextn guesses further ahead from its own state."""
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 50, 32, 48
SHORTEST_DOCUMENT = 200


@dataclass
class Measured:
    """Measurements of one drafter and number of drafts. plain, passes, drafted: tokens per second of each prompt."""

    plain: list[float] = field(default_factory=list)
    passes: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    equal: int = 0
    acceptance: Acceptance = field(default_factory=Acceptance)


class NoDrafts:
    """Every pass of the model reads one token."""

    def reset(self) -> None:
        pass

    def draft(self, hidden: torch.Tensor, next_tokens: torch.Tensor, count: int) -> list[int]:
        return []


QUICK = {"steps": 4, "drafts": [1]}


def train(kind: str, steps: int, runs: Path) -> subprocess.Popen[bytes]:
    """Start training a run named after its kind, on one thread."""
    settings = [
        "mtp.enabled=true",
        f"mtp.kind={kind}",
        f"mtp.n_tokens={KINDS[kind]}",
        f"train.total_steps={steps}",
        "train.time_budget=36000",
        "train.batch_size=2",
        "train.compile=off",
        "telemetry.tensorboard=false",
        f"eval.interval={10 * steps}",
        f"run.dir={runs}",
    ]
    command = [sys.executable, "-m", "nanochat_cli", "train", "--preset", "quickstart", "--name", kind, "--quiet"]
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def held_out_prompts(run: Path) -> list[list[int]]:
    """Tokens from the start and the middle of held-out documents that are long enough."""
    documents = open_run_data(run, load_run_config(run), PlainReporter()).tokens("val").documents()
    long_enough = (ids.tolist() for ids in documents if len(ids) >= SHORTEST_DOCUMENT)
    prompts = [ids[start : start + PROMPT_TOKENS] for ids in long_enough for start in (0, len(ids) // 2)]
    return prompts[:PROMPTS]


def timed(tokens: Iterable[int]) -> tuple[list[int], float]:
    """The tokens, and their rate per second, with the prompt included in the time."""
    started = time.perf_counter()
    drawn = list(tokens)
    return drawn, len(drawn) / (time.perf_counter() - started)


def measure(run: Path, prompts: list[list[int]], n_drafts: int) -> Measured:
    model, mtp = load_run(run)[0], load_mtp(run)
    assert mtp is not None
    packed = PackedTransformer.from_model(model)
    drafter = make_drafter(packed, mtp)
    greedy = SamplingConfig(max_tokens=NEW_TOKENS, temperature=0)
    _pair(packed, drafter, prompts[0], greedy, n_drafts, Measured())  # warm-up
    measured = Measured()
    for prompt in prompts:
        _pair(packed, drafter, prompt, greedy, n_drafts, measured)
    return measured


def _pair(
    packed: PackedTransformer,
    drafter: Drafter,
    prompt: list[int],
    sampling: SamplingConfig,
    n_drafts: int,
    measured: Measured,
) -> None:
    """One prompt, continued plainly, in passes of one token, and with drafts."""
    plain = (tokens[0] for tokens in generate_tokens(packed, [prompt], sampling) if tokens[0] is not None)
    expected, plain_rate = timed(plain)
    without = speculate_tokens(packed, NoDrafts(), prompt, sampling, 0)
    measured.passes.append(timed(without)[1])
    drafts = speculate_tokens(packed, drafter, prompt, sampling, n_drafts, acceptance=measured.acceptance)
    drawn, drafted_rate = timed(drafts)
    measured.plain.append(plain_rate)
    measured.drafted.append(drafted_rate)
    measured.equal += drawn == expected


def results_of(case: str, measured: Measured) -> list[Result]:
    """ratio: tokens per second with drafts / without, the median over prompts."""
    acceptance = measured.acceptance
    assert acceptance.rate is not None
    assert acceptance.tokens_per_check is not None
    return [
        summarise(case, "decoding", "tokens/s", measured.drafted, peer="plain decoding", peer_runs=measured.plain),
        summarise(
            case, "decoding", "tokens/s", measured.drafted, peer="passes of one token", peer_runs=measured.passes
        ),
        Result(case, "prompts with the tokens of plain decoding", measured.equal, "prompts"),
        Result(case, "acceptance", acceptance.rate, "share"),
        Result(case, "tokens per pass", acceptance.tokens_per_check, "tokens"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--runs", type=Path, help="a folder with trained runs heads and nextn")
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("speculative", arguments.out, quick=arguments.quick)
    torch.set_num_threads(1)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        runs = arguments.runs or Path(folder)
        for training in [train(kind, arguments.steps, runs) for kind in KINDS if not arguments.runs]:
            if training.wait():
                sys.exit(f"training ended with exit code {training.returncode}")
        prompts = held_out_prompts(runs / "heads")
        assert len(prompts) == PROMPTS
        for kind in KINDS:
            for n_drafts in arguments.drafts:
                results += results_of(f"{kind}, {n_drafts} drafts", measure(runs / kind, prompts, n_drafts))
                for result in results[-5:]:
                    print(f"{result.case}: {result.metric} {result.value:.4g} {result.unit} (ratio {result.ratio})")
    print(f"wrote {write_results(out, 'speculative', results, steps=arguments.steps)}")


if __name__ == "__main__":
    main()
