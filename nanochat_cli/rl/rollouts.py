"""Rollouts: what a model writes for a problem, several at once, with the log-probabilities that it drew them with.

Drawn by the packed runtime, whose weights are packed anew from the trained latents whenever they have changed. What a
rollout is worth is left to `judging`, what it is conditioned on to whoever makes its prompt.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.inference.batched import Completion, sample_batch
from nanochat_cli.inference.generate import LanguageModel, encode_prompt
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.model.transformer import Transformer


@dataclass(frozen=True)
class Prompt:
    """What the model reads for a problem: its own prompt, and what was put before it."""

    text: str
    examples: tuple[str, ...] = ()
    """Answers and advice in the text that an answer must not copy."""


@dataclass(frozen=True)
class Rollout:
    """One answer. sample: its number among those of the problem, from 0."""

    problem: Problem
    sample: int
    prompt: Prompt
    completion: Completion


def rollout_seed(seed: int, round_number: int, problem_id: str) -> int:
    """Sample j of a problem in a round draws with this plus j: nothing else decides which random numbers it gets."""
    digest = hashlib.sha256(f"{seed}/{round_number}/{problem_id}".encode()).digest()
    return int.from_bytes(digest[:7])  # below 2⁵⁶, so that adding j keeps it a seed


@dataclass
class Rate:
    """Tokens drawn, and the seconds that drawing took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass
class Sampler:
    """Draws groups of rollouts from one state of a model at a temperature. `refresh` comes before the first."""

    tokenizer: Tokenizer
    temperature: float
    max_tokens: int
    seed: int
    rate: Rate = field(default_factory=Rate)
    _model: LanguageModel | None = None

    def refresh(self, model: Transformer) -> None:
        """Draw from the weights that `model` has now."""
        self._model = PackedTransformer.from_model(model)

    @property
    def context(self) -> int:
        """Positions of the model."""
        return self._ready().config.max_seq_len

    def room(self, text: str) -> int:
        """Tokens that a completion of `text` may have, at most `max_tokens`; not above 0 when the text is too long."""
        return min(self.max_tokens, self.context - len(encode_prompt(self.tokenizer, text)))

    def has_room(self, text: str) -> bool:
        """Whether a completion of `text` may have all of `max_tokens`."""
        return self.room(text) == self.max_tokens

    def group(self, problem: Problem, prompt: Prompt, n: int, round_number: int) -> list[Rollout]:
        """n rollouts of a problem. Raises DataError for a prompt that is longer than the context."""
        started = time.perf_counter()
        settings = SamplingConfig(self.max_tokens, self.temperature, stop=problem.stop)
        seed = rollout_seed(self.seed, round_number, problem.id)
        (drawn,) = sample_batch(self._ready(), self.tokenizer, [prompt.text], n, settings, [seed])
        self.rate.tokens += sum(len(completion.tokens) for completion in drawn)
        self.rate.seconds += time.perf_counter() - started
        return [Rollout(problem, sample, prompt, completion) for sample, completion in enumerate(drawn)]

    def _ready(self) -> LanguageModel:
        assert self._model is not None, "refresh comes first"
        return self._model


def fitting(problems: Sequence[Problem], sampler: Sampler) -> tuple[list[Problem], list[Problem]]:
    """Problems whose prompt leaves room for a completion, and those whose prompt does not."""
    fits = [problem for problem in problems if sampler.room(problem.prompt) > 0]
    return fits, [problem for problem in problems if problem not in fits]
