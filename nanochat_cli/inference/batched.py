"""Several continuations of prompts at once: `sample_batch`, for evaluation and for rollouts of a policy.

`continuous_batch` draws them; here are the seeds of the rows, and what a finished one is. What a continuation is worth
is for others to say. Rollouts (`rl`) take completions from here, with the log-probabilities that they were drawn with.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_cli.inference.continuous_batch import ContinuousBatch, Finish, Row
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.inference.language_model import LanguageModel, TextTokenizer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.inference.text_stream import TextStream

MAX_ROWS = 32
"""Continuations that are drawn together; more wait until one of them ends. Bounds the key/value cache."""


@dataclass(frozen=True)
class Completion:
    """A continuation. text: without EOS, up to the stop string; tokens: all that were drawn, EOS included.

    log_probabilities: of each token, natural, under softmax(logits / temperature) (temperature 1 when greedy), before
    top-k, top-p, the repetition penalty and the exclusion of what is never sampled. finish: what ended it; `length` is
    max_tokens or the end of the context.
    """

    text: str
    tokens: tuple[int, ...]
    log_probabilities: tuple[float, ...]
    finish: Finish


def sample_batch(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[str],
    n: int,
    settings: SamplingConfig,
    seeds: Sequence[int],
) -> list[list[Completion]]:
    """n continuations of every prompt, in the order of the prompts.

    Continuation j of prompt i draws with seed seeds[i] + j, so that it depends neither on the other prompts nor on n
    (`continuous_batch` says how exactly); `settings.seed` is not read. A continuation ends at EOS, at a string of
    `settings.stop`, after max_tokens or where the context of the model ends. Raises DataError for a prompt that is
    longer than the context.
    """
    ids = [prompt for text in prompts for prompt in [encode_prompt(tokenizer, text)] * n]
    found = continue_tokens(model, tokenizer, ids, settings, [seed + j for seed in seeds for j in range(n)])
    return [found[start : start + n] for start in range(0, len(found), n)]


def continue_tokens(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    prompts: Sequence[list[int]],
    settings: SamplingConfig,
    seeds: Sequence[int],
) -> list[Completion]:
    """As `sample_batch`, of prompts as token ids, each at least one: a continuation of each, with its own seed."""
    rows = [
        Row(prompt, settings, seed, stream=TextStream(tokenizer, settings.stop), scored=True)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    longest = max(len(prompt) for prompt in prompts) + settings.max_tokens
    batch = ContinuousBatch(model, min(MAX_ROWS, len(rows)), longest, tokenizer.eos_id, tokenizer.never_sampled)
    for row in rows:
        batch.submit(row)
    while batch.step():
        pass
    return [
        Completion(row.text, tuple(row.tokens), tuple(row.log_probabilities), row.finish or "length") for row in rows
    ]
