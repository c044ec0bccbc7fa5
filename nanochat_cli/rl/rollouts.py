"""Draws rollouts: a model's answers to a problem, several at once, with the log-probabilities of their tokens.

The packed runtime draws them, with weights that are packed again whenever the trained latents have changed. `judging`
scores rollouts; callers make their prompts.
"""

import time
from dataclasses import dataclass, field

from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.evaluation.complete_problems import problem_seed
from nanochat_cli.evaluation.problem import Problem
from nanochat_cli.inference.batched import Completion, sample_batch
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.inference.language_model import LanguageModel
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.stopwatch import Rate
from nanochat_cli.model.transformer import Transformer


@dataclass(frozen=True)
class Prompt:
    """The text that the model reads for a problem: examples and advice, then the problem's own prompt."""

    text: str
    examples: tuple[str, ...] = ()
    """Answers and advice in the text, which an answer must not copy."""


@dataclass(frozen=True)
class Rollout:
    """One answer. sample: its number among the answers to the problem, from 0."""

    problem: Problem
    sample: int
    prompt: Prompt
    completion: Completion


@dataclass
class Sampler:
    """Draws groups of rollouts from one state of a model at a temperature. Call `refresh` before the first."""

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
        """Most tokens of a completion of `text`, up to `max_tokens`; 0 or less when the text is too long."""
        return min(self.max_tokens, self.context - len(encode_prompt(self.tokenizer, text)))

    def has_room(self, text: str) -> bool:
        """Whether a completion of `text` may have all of `max_tokens`."""
        return self.room(text) == self.max_tokens

    def group(self, problem: Problem, prompt: Prompt, n: int, round_number: int) -> list[Rollout]:
        """n rollouts of a problem. Raises DataError for a prompt that exceeds the context."""
        started = time.perf_counter()
        settings = SamplingConfig(self.max_tokens, self.temperature, stop=problem.stop)
        seed = problem_seed(self.seed, round_number, problem.id)
        (drawn,) = sample_batch(self._ready(), self.tokenizer, [prompt.text], n, settings, [seed])
        self.rate.tokens += sum(len(completion.tokens) for completion in drawn)
        self.rate.seconds += time.perf_counter() - started
        return [Rollout(problem, sample, prompt, completion) for sample, completion in enumerate(drawn)]

    def _ready(self) -> LanguageModel:
        assert self._model is not None, "call refresh first"
        return self._model
