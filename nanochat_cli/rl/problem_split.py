"""Splits problems into those that a run practises and those that it is only measured on.

A pure function of the problems and `[grpo]`; no torch.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.evaluation.problems import load_problems
from nanochat_cli.evaluation.prompt_boundary import Encode, at_token_boundaries
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter


@dataclass(frozen=True)
class ProblemSplit:
    """held_out: never practised."""

    practised: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    @property
    def languages(self) -> list[str]:
        return sorted({problem.language for problem in (*self.practised, *self.held_out)})

    def for_tokenizer(self, encode: Encode) -> "ProblemSplit":
        """The same problems with prompts that end where a token ends."""
        practised, held_out = (tuple(at_token_boundaries(part, encode)) for part in (self.practised, self.held_out))
        return ProblemSplit(practised, held_out)

    def of_round(self, config: GRPOConfig, seed: int, round_number: int) -> list[Problem]:
        """The problems that a round practises, in order: all, or `grpo.problems` of them."""
        ordered = sorted(self.practised, key=lambda problem: _place(f"{seed}/{round_number}/{problem.id}"))
        return ordered[: config.problems]


def load_split(config: GRPOConfig, reporter: Reporter) -> ProblemSplit:
    """The problems of `grpo.task` that can be judged, split by their ids and `grpo.held_out`.

    Warns of problems that are left out. Raises ConfigError and DataError for a bad task, and ConfigError when
    `grpo.max_level` leaves no problem.
    """
    if config.task is None:
        raise ConfigError("--task: name the problems to practise: python, rust, or a file (docs/problems.md)")
    everything = load_problems(config.task)
    usable = [problem for problem in everything if not problem.needs]
    if unusable := len(everything) - len(usable):
        reporter.warn(f"{config.task}: left out {counted(unusable, 'problem')} that no completion can pass")
    if config.max_level is not None:
        usable = [problem for problem in usable if problem.level is not None and problem.level <= config.max_level]
        if not usable:
            raise ConfigError(f"grpo.max_level = {config.max_level}: {config.task} has no problem of that level")
    return split(usable[: config.limit], config.held_out)


def split(problems: Sequence[Problem], held_out: float) -> ProblemSplit:
    """Hold out a share of the problems, rounded down, chosen by the hashes of their ids; keeps their order."""
    count = int(held_out * len(problems))
    chosen = set(sorted((problem.id for problem in problems), key=_place)[:count])
    return ProblemSplit(
        tuple(problem for problem in problems if problem.id not in chosen),
        tuple(problem for problem in problems if problem.id in chosen),
    )


def _place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
