"""The reward of an answer: the weighted mean of terms in [0, 1], each a function of an attempt, times two guards.

The sandbox's outcome for prompt and completion is an input; nothing is run here. Weights come from the table
`[rewards]` of a TOML file. Answers without work in them score 0 (`rejection_reason`).
"""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pygments.token import String

from nanochat_cli.config.toml import read_toml
from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.code_tokens import split
from nanochat_cli.evaluation.problem import Language
from nanochat_cli.evaluation.rejection_reason import Rejection, rejection_reason
from nanochat_cli.sandbox.limits import Outcome

NGRAM = 4
"""Length of the runs of words whose repetition is counted."""
DISTINCT = 0.5
"""From this share of distinct runs on, repetition costs nothing."""


@dataclass(frozen=True)
class Attempt:
    """A completion and its outcome in the sandbox."""

    language: Language
    prompt: str
    """The problem, up to where the model began; not the examples before it."""
    completion: str
    outcome: Outcome
    n_tests: int
    """Tests of the problem, so that a program that keeps tests from running gains nothing."""
    examples: tuple[str, ...] = field(default=())
    """Responses that the model was shown."""

    @property
    def solved(self) -> bool:
        return self.outcome.compiled and self.n_tests > 0 and self.outcome.passed >= self.n_tests


class RewardConfig(BaseModel):
    """The table `[rewards]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    compiles: float = Field(default=0.2, ge=0, description="weight: the program compiles")
    warnings: float = Field(default=0.05, ge=0, description="weight: 1 / (1 + warnings)")
    tests: float = Field(default=0.7, ge=0, description="weight: share of tests that pass")
    no_panics: float = Field(default=0.05, ge=0, description="weight: no panic, unwrap, unsafe, exit or muted lint")
    length: float = Field(default=1.0, ge=0, le=1, description="how much of the reward a long answer loses")
    repetition: float = Field(default=1.0, ge=0, le=1, description="how much of the reward a repetitive answer loses")
    max_characters: int = Field(default=2000, gt=0, description="length from which on the reward falls; 0 at twice it")

    @model_validator(mode="after")
    def _something_counts(self) -> "RewardConfig":
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError(f"one of {', '.join(TERMS)} must be above 0")
        return self


@dataclass(frozen=True)
class Reward:
    """The total in [0, 1], every term and guard that applies, and the reason if the answer was rejected."""

    total: float
    terms: Mapping[str, float]
    rejected: Rejection | None = None

    def metrics(self) -> dict[str, float]:
        """Total, terms and guards by the names of the log."""
        named = {f"reward/{name}": value for name, value in self.terms.items()}
        return {"reward/total": self.total, **named, "reward/rejected": float(self.rejected is not None)}


def reward(attempt: Attempt, config: RewardConfig) -> Reward:
    """Σ weight · term / Σ weight over the terms that apply, times 1 − strength · (1 − guard) for each guard.

    A program that does not compile scores 0, since every term is 0 then. A rejected answer has 0 for every term.
    Raises ConfigError when no term with a weight applies: only `tests` counts, and the problem has none.
    """
    terms = {name: term(attempt) for name, term in TERMS.items()}
    present = {name: value for name, value in terms.items() if value is not None}
    guards = {"length": length(attempt, config.max_characters), "repetition": repetition(attempt)}
    reason = rejection_reason(
        attempt.language, attempt.prompt, attempt.completion, examples=attempt.examples, solved=attempt.solved
    )
    if reason is not None:
        return Reward(0.0, dict.fromkeys([*present, *guards], 0.0), reason)
    weights = {name: getattr(config, name) for name in present}
    weight = sum(weights.values())
    if weight == 0:
        raise ConfigError("[rewards] only `tests` has a weight, and this problem has no tests: set `compiles` too")
    total = sum(weights[name] * value for name, value in present.items()) / weight
    for name, value in guards.items():
        total *= 1 - getattr(config, name) * (1 - value)
    return Reward(total, {**present, **guards})


def load_rewards(path: Path) -> RewardConfig:
    """The table `[rewards]` of a TOML file; other tables are ignored. Raises ConfigError."""
    tables = read_toml(path, what="rewards")
    table = tables.get("rewards")
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: no table [rewards]; its tables: {', '.join(tables) or 'none'}")
    try:
        return RewardConfig.model_validate(table)
    except ValidationError as error:
        problem = error.errors()[0]
    if not problem["loc"]:
        raise ConfigError(f"{path}: [rewards] {str(problem['msg']).removeprefix('Value error, ')}")
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, RewardConfig.model_fields, n=1)
        advice = f"did you mean {close[0]}?" if close else f"its keys: {', '.join(RewardConfig.model_fields)}"
        raise ConfigError(f"{path}: [rewards] {key}: unknown key; {advice}")
    requirement = str(problem["msg"]).replace("Input should", "must")
    raise ConfigError(f"{path}: [rewards] {key} = {problem['input']}: {requirement}")


# -- terms: from an attempt to a number in [0, 1], None where a term does not apply --------------------------


def compiles(attempt: Attempt) -> float:
    """1 when prompt and completion compile together."""
    return float(attempt.outcome.compiled)


def warnings(attempt: Attempt) -> float:
    """1 / (1 + warnings of the compiler); 0 when it does not compile."""
    outcome = attempt.outcome
    count = sum(one.level == "warning" and not _SUMMARY(one.message) for one in outcome.diagnostics)
    return 1 / (1 + count) if outcome.compiled else 0.0


def tests_passed(attempt: Attempt) -> float | None:
    """Share of the problem's tests that pass; None when it has none."""
    if attempt.n_tests == 0:
        return None
    return min(attempt.outcome.passed, attempt.n_tests) / attempt.n_tests if attempt.outcome.compiled else 0.0


def no_panics(attempt: Attempt) -> float:
    """1 when the model's code does not panic, unwrap, exit, use unsafe code or mute warnings."""
    code = split(attempt.language, attempt.prompt, attempt.completion)
    text = " ".join(token.text for token in code.completion if token.kind not in String)
    muted = any("allow" in attribute or "expect" in attribute for attribute in code.attributes)
    gives_up = muted or _GIVES_UP[attempt.language].search(text) is not None
    return float(attempt.outcome.compiled and not gives_up)


TERMS: Mapping[str, Callable[[Attempt], float | None]] = {
    "compiles": compiles,
    "warnings": warnings,
    "tests": tests_passed,
    "no_panics": no_panics,
}

# -- guards: from a completion to a factor in [0, 1] ---------------------------------------------------------


def length(attempt: Attempt, max_characters: int) -> float:
    """1 up to `max_characters`, then falling linearly to 0 at twice as many; surrounding white space is free."""
    return min(1.0, max(0.0, 2 - len(attempt.completion.strip()) / max_characters))


def repetition(attempt: Attempt) -> float:
    """Share of distinct runs of `NGRAM` words (1 − rep-n, arXiv:1908.04319) relative to `DISTINCT`, at most 1."""
    words = re.findall(r"\w+|[^\w\s]", attempt.completion)
    runs = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return min(1.0, len(set(runs)) / len(runs) / DISTINCT) if runs else 1.0


_SUMMARY = re.compile(r"\d+ warnings? emitted").fullmatch
"""rustc's last warning counts the others."""

# Matched against tokens with one space between them, without comments and docstrings.
_GIVES_UP: Mapping[Language, re.Pattern[str]] = {
    "rust": re.compile(
        r"\b(?:panic|todo|unimplemented|unreachable)!|\bunsafe\b|(?:\.|:) (?:unwrap|expect|unwrap_unchecked)\b"
        r"|\bprocess (?:::|: :) (?:exit|abort)\b"
    ),
    "python": re.compile(
        r"\b(?:exec|eval|exit|quit|_exit|filterwarnings|simplefilter|catch_warnings) \(|\bNotImplementedError\b"
        r"|\bSystemExit\b|\bexcept :"
    ),
}
