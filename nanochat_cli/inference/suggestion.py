"""Short, finished suggestions for editors: llama.cpp's `infill` sampler, and its rules for the lines of a suggestion.

Both follow llama.cpp, so that its plugins show the same: `llama_sampler_infill_apply` in src/llama-sampler.cpp, and
`process_token` in tools/server/server-context.cpp.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.inference.language_model import TextTokenizer
from nanochat_cli.inference.text_stream import TextStream

CANDIDATES = 64
"""Most tokens that are compared with each other; llama.cpp's plugins ask for 40."""
PROBABLE = 0.2
"""What a token needs, together with those that it begins, to be drawn."""


@dataclass(frozen=True)
class InfillSampler:
    """Ends a text as soon as its end is likely, and joins tokens of which one begins the other.

    eos: drawn where no token is probable enough; ends: all that end a text, eos among them.
    """

    tokenizer: TextTokenizer
    eos: int
    ends: frozenset[int]

    def __call__(self, probabilities: Tensor) -> Tensor:
        """float64 [B, V] after top-k and top-p: what to draw from instead, likewise."""
        found, best = torch.zeros_like(probabilities), probabilities.topk(min(CANDIDATES, probabilities.shape[1]))
        for row, ids, values in zip(found, best.indices.tolist(), best.values.tolist(), strict=True):
            for token, chance in self.choose({id: one for id, one in zip(ids, values, strict=True) if one > 0}).items():
                row[token] = chance
        return found

    def choose(self, chances: Mapping[int, float]) -> dict[int, float]:
        """chances: of the candidates by their ids, most probable first; those that are left, summing to 1."""
        ends = {token: chance for token, chance in chances.items() if token in self.ends}
        texts = {token: chance for token, chance in chances.items() if token not in ends}
        if 3 * sum(ends.values()) * len(chances) > sum(texts.values()):
            return _normalised(ends)
        kept = {token: chance for token, chance in self._joined(texts).items() if chance >= PROBABLE}
        if not kept:
            return {self.eos: 1.0}
        even = 1 / (len(kept) + 1)
        left = _normalised({**kept, **ends})
        return _normalised({token: chance for token, chance in left.items() if chance >= even or token in ends})

    def _joined(self, chances: Mapping[int, float]) -> dict[int, float]:
        """The more probable of two tokens of which one begins the other has the chances of both."""
        left = dict(chances)
        for one in chances:
            for other in chances:
                if one not in left:
                    break
                if one == other or other not in left or not self._begins(one, other):
                    continue
                into, gone = (other, one) if left[other] > left[one] else (one, other)
                left[into] += left.pop(gone)
        return left

    def _begins(self, one: int, other: int) -> bool:
        start = self.tokenizer.token_bytes(one)
        return bool(start) and self.tokenizer.token_bytes(other).startswith(start)


def _normalised(chances: Mapping[int, float]) -> dict[int, float]:
    total = sum(chances.values())
    return {token: chance / total for token, chance in chances.items()}


class Suggestion(TextStream):
    """The text of a suggestion. It ends where a later line is indented less than `indent` characters (an empty line
    is, too), and with the first line that ends more than `seconds` after its first token.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        stop: Sequence[str],
        indent: int = 0,
        seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(tokenizer, stop)
        self.cut = False
        """Whether one of the two rules has ended it."""
        self._indent, self._seconds, self._clock = indent, seconds, clock
        self._started: float | None = None
        self._line: str | None = None
        """What there is of the current line; None in the first one."""

    def feed(self, token_id: int) -> str:
        """As of a TextStream."""
        self._started = self._clock() if self._started is None else self._started
        return self._within(super().feed(token_id))

    def finish(self) -> str:
        """As of a TextStream."""
        return self._within(super().finish())

    def _within(self, piece: str) -> str:
        """As much of the new text as the rules allow."""
        for at, character in enumerate(piece):
            if character not in " \t" and self._is_indented_less():
                return self._ended(piece[:at])
            self._line = "" if character == "\n" else None if self._line is None else self._line + character
            if character == "\n" and self._is_late():
                return self._ended(piece[: at + 1])
        return piece

    def _is_indented_less(self) -> bool:
        """Whether there is nothing but white space in this later line, and too little."""
        return self._line is not None and not self._line.strip(" \t") and len(self._line) < self._indent

    def _is_late(self) -> bool:
        return self._seconds is not None and self._started is not None and self._clock() - self._started > self._seconds

    def _ended(self, piece: str) -> str:
        self.stopped = self.cut = True
        return piece
