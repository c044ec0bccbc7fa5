"""A run so small that rounds take seconds: its model was trained on right and wrong answers to a file's problems."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanochat_cli.config.load import CONFIG_FILE, config_to_toml
from nanochat_cli.config.schema import Config
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.rl.judging import Judge
from nanochat_cli.rl.learner import Learner
from nanochat_cli.rl.problem_split import load_split
from nanochat_cli.rl.rejection_sampling_tuning import LikelihoodObjective
from nanochat_cli.rl.rewards import RewardConfig
from nanochat_cli.rl.run_grpo import GRPORun, Start
from nanochat_cli.rl.trajectories import Trajectory, batches, collate
from nanochat_cli.sandbox.limits import Outcome, Program

NUMBERS = range(2, 8)
STOP = ["\ndef "]


def problem(number: int) -> dict[str, object]:
    """`add_N(x)`, whose answer is `x + N`."""
    return {
        "id": f"add-{number}",
        "language": "python",
        "level": 1,
        "prompt": f"def add_{number}(x):\n",
        "tests": [{"call": f"add_{number}({x})", "expected": str(x + number)} for x in (0, 5)],
        "stop": STOP,
    }


def write_problems(path: Path, numbers: Sequence[int] = NUMBERS) -> Path:
    path.write_text("".join(json.dumps(problem(number)) + "\n" for number in numbers), encoding="utf-8")
    return path


def texts() -> list[tuple[str, str]]:
    """(prompt, answer) with text after it: each prompt as often with its right answer as with a wrong one."""
    answers = [(n, sign) for n in NUMBERS for sign in "+-"]
    return [(f"def add_{n}(x):\n", f"    return x {sign} {n}\n\ndef ") for n, sign in answers]


def config_of(folder: Path, **grpo: object) -> Config:
    return Config.model_validate(
        {
            "run": {"dir": str(folder), "name": "source", "seed": 3},
            "model": {
                "vocab_size": 300,
                "dim": 128,
                "n_layers": 2,
                "n_heads": 2,
                "n_kv_heads": 1,
                "ffn_dim": 128,
                "max_seq_len": 96,
                "qk_norm": True,
                "embedding_std": 0.8,
                "head_std": 0.001,
                "tie_embeddings": False,
            },
            "train": {"seq_len": 96, "batch_size": 16, "device": "cpu", "dtype": "fp32", "compile": "off"},
            "optim": {"lr": 0.02, "embedding_lr": 0.01, "head_lr": 0.002, "scalar_lr": 0.001},
            "telemetry": {"tensorboard": False},
            "grpo": {"lr_factor": 1.0, **grpo},
        }
    )


def make_run(folder: Path, steps: int = 90) -> Path:
    """`folder/source`: a run whose model answers right a third of the time after 90 steps."""
    config = config_of(folder)
    tokenizer = Tokenizer.train([prompt + answer for prompt, answer in texts()], 300)
    torch.manual_seed(0)
    learner = Learner(Transformer(config.model), config, QuietReporter())
    examples = [Trajectory(tuple(tokenizer.encode(p)), tuple(tokenizer.encode(a))) for p, a in texts()]
    for batch in batches(examples, 12, steps, 0, 0):
        learner.update(learner.gradient(collate(batch), LikelihoodObjective())["loss/objective"])
    run = folder / "source"
    run.mkdir(parents=True)
    (run / CONFIG_FILE).write_text(config_to_toml(config), encoding="utf-8")
    tokenizer.save(run / "tokenizer.json")
    tensors = {"model": learner.model.state_dict()}
    checkpoints.save(run, steps, tensors, {}, model_config=config.model.model_dump(mode="json"))
    return run


class ReadingPool:
    """Judges by reading: `return x + N` for `add_N` passes, anything else that starts like it compiles."""

    def __init__(self) -> None:
        self.seen = 0

    def judge_all(self, programs: Sequence[Program]) -> list[Outcome]:
        self.seen += len(programs)
        return [self._judge(program) for program in programs]

    def _judge(self, program: Program) -> Outcome:
        number = program.source.partition("(")[0].removeprefix("def add_")
        total = len(program.tests)
        if f"return x + {number}\n" in program.source:
            return Outcome("ran", "ok", passed=total, total=total)
        try:
            compile(program.source, "program", "exec")
        except (SyntaxError, ValueError):
            return Outcome("not compiled", "compile error", total=total)
        return Outcome("ran", "ok", passed=0, total=total)


def problems(folder: Path) -> list[Problem]:
    return load_problems(write_problems(folder / "problems.jsonl"))


def grpo_run(
    source: Path, folder: Path, *, resume: bool = False, pool: Any = None, seed: int = 3, **grpo: object
) -> GRPORun:
    """A run in `folder/tuned` that has begun or continues; `run()` does its rounds. pool: by default a ReadingPool."""
    folder.mkdir(exist_ok=True)
    task = str(write_problems(folder / "problems.jsonl"))
    values = {"source": source, "task": task, "rounds": 2, "group": 4, "max_tokens": 20, "batch_size": 8, **grpo}
    config = config_of(folder, **values)
    config.run.name, config.run.seed = "tuned", seed
    run_dir = folder / "tuned"
    judge = Judge(pool or ReadingPool(), RewardConfig())
    start = Start.of_run(run_dir, config) if resume else Start.of_source(source, config)
    run = GRPORun(config, run_dir, load_split(config.grpo, QuietReporter()), judge, QuietReporter(), start)
    if not resume:
        run_dir.mkdir(exist_ok=True)
        (run_dir / CONFIG_FILE).write_text(config_to_toml(config), encoding="utf-8")
        run.tokenizer.save(run_dir / "tokenizer.json")
    return run
