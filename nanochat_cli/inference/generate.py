"""Continuing a prompt: tokens one at a time with the key/value cache, and text that streams as it comes.

`generate_tokens` knows token ids only; `TextStream` turns ids into text that is whole characters and ends
before a stop string; `generate` is the two together. Nothing here prints.

Context: when the positions of the model are used up, the later half of them is read again from position
0 and generation goes on (a sliding window). Only a prompt that itself is longer than the context is an error.
"""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import DataError
from nanochat_cli.inference.sampling import SamplingConfig, as_ids, generators, sample
from nanochat_cli.model.cache import KVCache


class LanguageModel(Protocol):
    """What generation needs of a model: `model.Transformer` and `inference.PackedTransformer` are two."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def next_logits(self, tokens: Tensor, cache: KVCache, /) -> Tensor: ...


class TextTokenizer(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_id(self) -> int: ...
    @property
    def never_sampled(self) -> Sequence[int]: ...
    def encode(self, text: str) -> list[int]: ...
    def token_bytes(self, token_id: int, /) -> bytes: ...


def generate(model: LanguageModel, tokenizer: TextTokenizer, prompt: str, sampling: SamplingConfig) -> Iterator[str]:
    """Yield the continuation of `prompt` in pieces of whole characters, up to EOS, a stop string or max_tokens.

    An empty prompt starts a new document (it reads as EOS). Raises DataError when the prompt is too long.
    """
    ids = encode_prompt(tokenizer, prompt)
    batches = generate_tokens(model, [ids], sampling, tokenizer.eos_id, tokenizer.never_sampled)
    yield from as_text((tokens[0] for tokens in batches), tokenizer, sampling.stop)


def as_text(tokens: Iterable[int | None], tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of whole characters of a stream of token ids, up to a stop string or None."""
    stream = TextStream(tokenizer, stop)
    for token in tokens:
        if token is None:
            break
        if piece := stream.feed(token):
            yield piece
        if stream.stopped:
            return
    if rest := stream.finish():
        yield rest


def encode_prompt(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    """Token ids to start from; documents are separated by EOS in training, so that nothing reads as EOS."""
    return tokenizer.encode(prompt) or [tokenizer.eos_id]


def generate_tokens(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    eos_id: int | None = None,
    never: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Yield, step by step, the next token of every prompt, at most max_tokens times.

    prompts: B lists of equally many ids, at least one. A row that has produced `eos_id` yields None from there on
    (EOS itself is not yielded); iteration ends when every row has. Ids in `never` are not chosen. Raises DataError
    when the prompts are longer than the context of the model.
    """
    width = len(prompts[0])
    if not width or any(len(prompt) != width for prompt in prompts):
        raise ValueError("prompts of a batch must have the same number of tokens, at least one")
    context = model.config.max_seq_len
    if width > context:
        raise DataError(f"the prompt has {width} tokens and the model's context holds {context}: shorten the prompt")

    tokens = torch.tensor(prompts, dtype=torch.int64, device=model.device)
    cache = KVCache(model.config, len(prompts), min(context, width + sampling.max_tokens), model.dtype, model.device)
    seen = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool, device=model.device)
    seen.scatter_(1, tokens, True)
    rows = generators(sampling.seed, len(prompts))
    left_out = as_ids(never, model.device)
    running = [True] * len(prompts)
    unread = tokens
    for _ in range(sampling.max_tokens):
        if cache.length + unread.shape[1] > context:
            cache.clear()
            unread = tokens[:, -max(1, context // 2) :]
        chosen = sample(model.next_logits(unread, cache), sampling, seen, rows, left_out)
        unread = chosen[:, None]
        tokens = torch.cat((tokens, unread), dim=1)[:, -context:]
        seen.scatter_(1, unread, True)
        running = [alive and token != eos_id for alive, token in zip(running, chosen.tolist(), strict=True)]
        if not any(running):
            return
        yield [token if alive else None for alive, token in zip(running, chosen.tolist(), strict=True)]


class TextStream:
    """Token ids in, text out; a character or a possible stop string is held back until it is complete."""

    def __init__(self, tokenizer: TextTokenizer, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        """A stop string was reached; nothing comes after it."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token_id: int) -> str:
        """The text that is certain after this token, possibly empty. Bytes that are no UTF-8 become U+FFFD."""
        return self._release(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """What was held back when generation ended otherwise than by a stop string."""
        text = self._release(self._decoder.decode(b"", final=True))
        if self.stopped:
            return text
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
