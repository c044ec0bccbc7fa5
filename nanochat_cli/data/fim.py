"""Fill-in-the-middle (arXiv:2207.14255): rows of training whose middle comes last, and the prompts that ask for one.

What lies between two ends of documents in a row is a fragment. A share of them is cut in three at random characters,
not at tokens, since a cursor may stand inside a word. The parts are tokenised one by one and put in one of the two
orders in which llama.cpp's `/infill` asks, the second with `--spm-infill`:

    <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle <|endoftext|>
    <|fim_suffix|> suffix <|fim_prefix|> prefix <|fim_middle|> middle <|endoftext|>

A fragment keeps its number of tokens, so that its end stays in the row: a model that never saw it would not learn to
stop. As many tokens as the new ones take are left out where the row has cut the document anyway: at the beginning of
a row's first prefix, and at the end of any other suffix. Knows tokens and text; knows nothing of processes or torch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.batches import Batch, BatchSource
from nanochat_cli.data.order import mix
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError

NAMES = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
FEWEST_TOKENS = 16
"""Shorter fragments stay as they are."""


class Sentinels(NamedTuple):
    """Ids of the tokens before the prefix, the suffix and the middle."""

    prefix: int
    suffix: int
    middle: int


class Gap(NamedTuple):
    """A place to write at: the text before it and the text after it."""

    prefix: str
    suffix: str


def sentinels(tokenizer: Tokenizer) -> Sentinels:
    """Raises DataError if the vocabulary lacks one of them."""
    if missing := [name for name in NAMES if name not in tokenizer.special_tokens]:
        raise DataError(
            f"fill-in-the-middle (fim.rate) needs {', '.join(missing)} in the vocabulary; those that `nanochat "
            "tokenize` trains have them"
        )
    return Sentinels(*(tokenizer.special_tokens[name] for name in NAMES))


def in_order(names: Sentinels, prefix: Sequence[int], suffix: Sequence[int], *, spm: bool) -> list[int]:
    """The tokens in front of the middle. spm: suffix first."""
    before, after = [names.prefix, *prefix], [names.suffix, *suffix]
    return [*after, *before, names.middle] if spm else [*before, *after, names.middle]


def infill_prompt(tokenizer: Tokenizer, gap: Gap, room: int, *, spm: bool) -> list[int]:
    """Tokens that ask for what belongs in a gap: those of llama.cpp's `/infill` with a batch of `room` tokens.

    Three quarters of the room are for the end of the prefix, one for the beginning of the suffix (format_prompt_infill
    in llama.cpp's tools/server/server-common.cpp); the prompt has at most room + 1 tokens. Raises DataError as
    `sentinels` does.
    """
    before, after = tokenizer.encode(gap.prefix), tokenizer.encode(gap.suffix)
    quarter = room // 4
    before = before[max(0, len(before) - 3 * quarter) :]
    return in_order(sentinels(tokenizer), before, after[: max(0, quarter - 2)], spm=spm)


def cut(content: bytes, first: float, second: float) -> tuple[bytes, bytes, bytes]:
    """Prefix, middle and suffix, cut at these two shares (in 0..1, 1 excluded) of the places between characters."""
    is_start = np.frombuffer(content, dtype=np.uint8) & 0xC0 != 0x80
    places = np.append(np.flatnonzero(is_start), len(content))
    low, high = sorted(int(places[int(share * len(places))]) for share in (first, second))
    return content[:low], content[low:high], content[high:]


class FimBatches:
    """The rows of `source`, some of them transformed: a pure function of a row, the seed, and its place in the order.

    The first row of batch i has place i × stride + shift (see `data.batches`).
    """

    def __init__(
        self, source: BatchSource, tokenizer: Tokenizer, fim: FimConfig, seed: int, stride: int, shift: int
    ) -> None:
        self.source, self.tokenizer, self.fim = source, tokenizer, fim
        self.seed, self.stride, self.shift = seed, stride, shift
        self._names = sentinels(tokenizer)
        self._special = set(tokenizer.special_tokens.values())

    def batch(self, index: int) -> Batch:
        """Batch `index` ≥ 0: (inputs, targets), int64 [batch_size, seq_len]; targets are inputs shifted by one."""
        inputs, targets = self.source.batch(index)
        rows = np.concatenate((inputs, targets[:, -1:]), axis=1)
        for number, row in enumerate(rows):
            self._transform(row, index * self.stride + self.shift + number)
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def _transform(self, row: NDArray[np.int64], place: int) -> None:
        """Exchange the row's chosen fragments in place."""
        ends = (np.flatnonzero(row == self.tokenizer.eos_id) + 1).tolist()
        for number, (start, stop) in enumerate(zip([0, *ends], [*ends, len(row)], strict=True)):
            chosen, order, *shares = _draws(self.seed, place, number)
            if chosen >= self.fim.rate or stop - start < FEWEST_TOKENS:
                continue
            fragment = self._middle_last(
                row[start:stop].tolist(), shares, spm=order < self.fim.spm_rate, from_the_front=start == 0
            )
            if fragment is not None:
                row[start:stop] = fragment

    def _middle_last(
        self, fragment: list[int], shares: Sequence[float], *, spm: bool, from_the_front: bool
    ) -> list[int] | None:
        """As many tokens as the fragment has; None if they would not hold the middle, or if some of it are special."""
        eos = self.tokenizer.eos_id
        text = fragment[:-1] if fragment[-1] == eos else fragment
        if not self._special.isdisjoint(text):
            return None
        first, second = shares
        prefix, middle, suffix = map(self.tokenizer.encode_bytes, cut(self.tokenizer.decode_bytes(text), first, second))
        excess = len(self._names) + len(prefix) + len(middle) + len(suffix) + 1 - len(fragment)
        if not 0 <= excess <= len(prefix) + len(suffix):
            return None
        before = min(excess, len(prefix)) if from_the_front else max(0, excess - len(suffix))
        kept = suffix[: len(suffix) - (excess - before)]
        return [*in_order(self._names, prefix[before:], kept, spm=spm), *middle, eos]


def _draws(seed: int, place: int, fragment: int) -> list[float]:
    """Four numbers in 0..1, 1 excluded: pseudo-random, and a function of the arguments."""
    key = mix(mix(mix(mix(seed)) ^ place) ^ fragment)
    return [(mix(key + number) >> 11) * 2.0**-53 for number in range(4)]
