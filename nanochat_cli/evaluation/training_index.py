"""What training text suggests without a model: counts of the last tokens, and the longest match to copy from.

Both read one index, the places of the training tokens sorted by the four tokens before them. They are the peers of the
suite `completion`. Knows token ids only.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BEFORE = 4
"""Tokens before a place that it is sorted by; five with its own make a 5-gram."""


class TrainingIndex:
    """tokens: the training tokens, int [n], n > 4; vocab_size: above each of them.

    A vocabulary of more than 65,536 is sorted by three tokens (4-grams). Memory: 16 bytes per token, and as much again
    while it is built.
    """

    def __init__(self, tokens: NDArray[np.integer], vocab_size: int) -> None:
        self._bits = max(1, (vocab_size - 1).bit_length())
        self.before = min(BEFORE, 64 // self._bits)
        self.tokens = tokens
        # The nearest token is the most significant, so that places after the same few tokens are neighbours.
        keys = np.zeros(len(tokens) - self.before, dtype=np.uint64)
        for distance in range(1, self.before + 1):
            column = tokens[self.before - distance : len(tokens) - distance].astype(np.uint64)
            keys |= column << np.uint64(64 - distance * self._bits)
        order = np.argsort(keys, kind="stable")
        self._keys, self._places = keys[order], order + self.before

    def likely(self, context: Sequence[int]) -> int:
        """The token that most often follows as many last tokens of the context as ever occurred, of equals the first.

        The most frequent token where not even the last one occurred ("back-off" without weights).
        """
        for length in range(min(self.before, len(context)), -1, -1):
            places = self._after(context, length)
            if len(places):
                return int(np.bincount(self.tokens[places]).argmax())
        raise AssertionError("every place follows zero tokens")

    def copied(self, context: Sequence[int], most: int) -> NDArray[np.integer]:
        """At most `most` tokens from where the longest match of the context's end goes on; of equals the first.

        Empty where its last token never occurred.
        """
        length = min(self.before, len(context))
        while length and not len(self._after(context, length)):
            length -= 1
        if not length:
            return self.tokens[:0]
        places = self._after(context, length)
        if length == self.before:  # else a longer match would have been found
            for length in range(self.before + 1, len(context) + 1):
                longer = places[places >= length]
                longer = longer[self.tokens[longer - length] == context[-length]]
                if not len(longer):
                    break
                places = longer
        start = int(places.min())
        return self.tokens[start : start + most]

    def _after(self, context: Sequence[int], length: int) -> NDArray[np.int64]:
        """The places behind the last `length` tokens of the context."""
        low = 0
        for distance in range(1, length + 1):
            low |= int(context[-distance]) << (64 - distance * self._bits)
        high = low + (1 << (64 - length * self._bits)) - 1
        first = np.searchsorted(self._keys, np.uint64(low), side="left")
        return self._places[first : np.searchsorted(self._keys, np.uint64(high), side="right")]
