"""Several continuations of a prompt at once: `sample_batch`, for evaluation and for rollouts of a policy.

A prompt is read once, and its rows share what was read; each row then draws from a generator of its own and ends by
itself. Rows that have ended leave the batch. Knows token ids and text as `generate` does; what a continuation is worth
is for others to say. Rollouts (`rl`) take completions from here, with the log-probabilities that they were drawn with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nanochat_cli.errors import DataError
from nanochat_cli.inference.generate import LanguageModel, TextStream, TextTokenizer, encode_prompt
from nanochat_cli.inference.sampling import SamplingConfig, as_ids, sample
from nanochat_cli.model.cache import KVCache

MAX_ROWS = 32
"""Continuations that are drawn together; of more, one group follows the other. Bounds the key/value cache."""

Finish = Literal["eos", "stop", "length"]


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

    Continuation j of prompt i draws with seed seeds[i] + j, so that it depends neither on the other prompts nor, but
    for rounding, on n; `settings.seed` is not read. A continuation ends at EOS, at a string of `settings.stop`, after
    max_tokens or where the context of the model ends. Raises DataError for a prompt that is longer than the context.
    """
    found = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        ids = encode_prompt(tokenizer, prompt)
        starts = range(0, n, MAX_ROWS)
        groups = [range(seed + start, seed + min(start + MAX_ROWS, n)) for start in starts]
        found.append([one for group in groups for one in continue_tokens(model, tokenizer, ids, settings, group)])
    return found


@torch.no_grad()
def continue_tokens(
    model: LanguageModel, tokenizer: TextTokenizer, prompt: list[int], settings: SamplingConfig, seeds: Sequence[int]
) -> list[Completion]:
    """As `sample_batch`, of one prompt as token ids, at least one: a continuation for each seed, all at once."""
    context = model.config.max_seq_len
    if len(prompt) > context:
        raise DataError(
            f"the prompt has {len(prompt)} tokens and the model's context holds {context}: shorten the prompt"
        )
    limit = min(settings.max_tokens, context - len(prompt) + 1)  # the last token is not read
    drafts = [_Draft(tokenizer, settings.stop) for _ in seeds]
    left_out = as_ids(tokenizer.never_sampled, model.device)
    rows = list(range(len(seeds)))  # of the batch: which draft each row belongs to
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    cache = KVCache(model.config, 1, min(context, len(prompt) + limit), model.dtype, model.device)
    read = torch.tensor([prompt], dtype=torch.int64, device=model.device)
    seen = torch.zeros(len(seeds), model.config.vocab_size, dtype=torch.bool, device=model.device)
    seen[:, prompt] = True
    for step in range(limit):
        logits = model.next_logits(read, cache).float()
        if step == 0 and len(rows) > 1:
            logits, cache = logits.expand(len(rows), -1), cache.rows([0] * len(rows))
        chosen = sample(logits, settings, seen, generators, left_out)
        read = chosen[:, None]
        seen.scatter_(1, read, True)
        for row, token, log_probability in zip(
            rows, chosen.tolist(), _log_probabilities(logits, chosen, settings.temperature), strict=True
        ):
            if drafts[row].finish is None:
                drafts[row].add(token, log_probability)
        running = [place for place, row in enumerate(rows) if drafts[row].finish is None]
        if not running:
            break
        if 2 * len(running) <= len(rows):
            rows, generators = [rows[place] for place in running], [generators[place] for place in running]
            read, seen, cache = read[running], seen[running], cache.rows(running)
    return [draft.completion() for draft in drafts]


class _Draft:
    """A continuation that is being drawn."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str]) -> None:
        self.finish: Finish | None = None
        self._eos_id = tokenizer.eos_id
        self._stream = TextStream(tokenizer, stop)
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self._log_probabilities: list[float] = []

    def add(self, token: int, log_probability: float) -> None:
        self._tokens.append(token)
        self._log_probabilities.append(log_probability)
        if token == self._eos_id:
            self.finish = "eos"
            return
        self._pieces.append(self._stream.feed(token))
        if self._stream.stopped:
            self.finish = "stop"

    def completion(self) -> Completion:
        rest = self._stream.finish()
        finish = self.finish or ("stop" if self._stream.stopped else "length")
        return Completion("".join(self._pieces) + rest, tuple(self._tokens), tuple(self._log_probabilities), finish)


def _log_probabilities(logits: Tensor, chosen: Tensor, temperature: float) -> list[float]:
    """Of the tokens chosen int64 [B] under logits float32 [B, V]."""
    scaled = logits / temperature if temperature > 0 else logits
    return scaled.log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1).tolist()
