"""Runs of words as hashes: what near-duplicates and contamination are recognised by.

A word is a run of letters, digits, underscores and bytes beyond ASCII, or one other non-blank byte. Knows bytes.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BLANK, _WORD, _SIGN = 0, 1, 2
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_MULTIPLIER), -1, 1 << 64))


def _byte_kinds() -> NDArray[np.uint8]:
    kinds = np.full(256, _SIGN, dtype=np.uint8)
    kinds[[ord(char) for char in " \t\n\r\v\f"]] = _BLANK
    kinds[[byte for byte in range(256) if chr(byte).isalnum() or byte == ord("_") or byte >= 0x80]] = _WORD
    return kinds


_KINDS = _byte_kinds()


class Words(NamedTuple):
    """hashes: uint64 [words]; is_sign: bool [words], one byte that is no letter or digit."""

    hashes: NDArray[np.uint64]
    is_sign: NDArray[np.bool_]


def words_of(content: bytes) -> Words:
    """The words in order. A hash is of a word's bytes as a polynomial, from differences of prefix sums modulo 2^64."""
    text = np.frombuffer(content, dtype=np.uint8)
    kinds = _KINDS[text]
    in_word = kinds == _WORD
    starts = np.flatnonzero((kinds == _SIGN) | (in_word & ~np.concatenate(([False], in_word[:-1]))))
    ends = np.flatnonzero((kinds == _SIGN) | (in_word & ~np.concatenate((in_word[1:], [False])))) + 1
    powers = np.concatenate(([np.uint64(1)], np.full(max(len(text) - 1, 0), _MULTIPLIER))).cumprod()[: len(text)]
    sums = np.concatenate(([np.uint64(0)], ((text.astype(np.uint64) + np.uint64(1)) * powers).cumsum()))
    inverses = np.concatenate(([np.uint64(1)], np.full(max(len(text) - 1, 0), _INVERSE))).cumprod()
    return Words(mixed((sums[ends] - sums[starts]) * inverses[starts]), ~in_word[starts])


def runs_of(hashes: NDArray[np.uint64], length: int) -> NDArray[np.uint64]:
    """uint64 [max(len(hashes) − length + 1, 0)]: a hash of each run of `length` words."""
    count = max(len(hashes) - length + 1, 0)
    runs = np.zeros(count, dtype=np.uint64)
    for place in range(length if count else 0):
        runs = combined(runs, hashes[place : place + count])
    return runs


def combined(before: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The hash of a sequence that is one value longer, from the hash of the others."""
    return mixed(before * _MULTIPLIER + values)


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ values >> np.uint64(27)
