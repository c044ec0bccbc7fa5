"""Clusters of near-duplicates: documents that share at least half of their runs of five words.

MinHash signatures by `rensa`, cut into bands, propose pairs (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is checked by its exact Jaccard similarity, and pairs that pass are joined (union-find), so a cluster is what
chains of near-duplicates connect. Memory is a few hundred bytes per document: signatures and shingles are in unnamed
files, which the system removes with the process. Knows bytes; knows nothing of splits or tokens.
"""

import tempfile
from array import array
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
THRESHOLD = 0.5
"""Smallest Jaccard similarity of the shingles of near-duplicates."""
# A pair of similarity s shares a band with probability 1 - (1 - s⁴)⁶⁴: 98.4 % at 0.5, 99.98 % at 0.6, 0.04 % at 0.05.
BANDS, ROWS = 64, 4
SEED = 0
# Signatures, of some kilobytes each, are computed for about so many shingles or documents at once.
BATCH_SHINGLES = 1 << 20
BATCH_DOCUMENTS = 256
# A document is compared with so many others per band: this bounds the work on boilerplate that thousands share.
COMPARED_IN_A_BAND = 16

_BLANK, _WORD, _SIGN = 0, 1, 2
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so it has an inverse modulo 2^64
_INVERSE = np.uint64(pow(int(_MULTIPLIER), -1, 1 << 64))


def _byte_kinds() -> NDArray[np.uint8]:
    kinds = np.full(256, _SIGN, dtype=np.uint8)
    kinds[[ord(char) for char in " \t\n\r\v\f"]] = _BLANK
    kinds[[byte for byte in range(256) if chr(byte).isalnum() or byte == ord("_") or byte >= 0x80]] = _WORD
    return kinds


_KINDS = _byte_kinds()


def shingles(content: bytes) -> NDArray[np.uint64]:
    """Sorted distinct hashes of all runs of SHINGLE_WORDS words; one for a shorter text, none for blanks.

    A word is a run of letters, digits, underscores and bytes beyond ASCII, or one other non-blank byte.
    """
    words = _word_hashes(content)
    if len(words) < SHINGLE_WORDS:
        words = np.concatenate((words, np.zeros(SHINGLE_WORDS - len(words), np.uint64))) if len(words) else words
    count = len(words) - SHINGLE_WORDS + 1
    hashes = np.zeros(max(count, 0), dtype=np.uint64)
    for place in range(SHINGLE_WORDS if count > 0 else 0):
        hashes = _mixed(hashes * _MULTIPLIER + words[place : place + count])
    return np.unique(hashes)


def _word_hashes(content: bytes) -> NDArray[np.uint64]:
    """A hash of every word: its bytes as a polynomial, from differences of prefix sums modulo 2^64."""
    text = np.frombuffer(content, dtype=np.uint8)
    kinds = _KINDS[text]
    in_word = kinds == _WORD
    starts = np.flatnonzero((kinds == _SIGN) | (in_word & ~np.concatenate(([False], in_word[:-1]))))
    ends = np.flatnonzero((kinds == _SIGN) | (in_word & ~np.concatenate((in_word[1:], [False])))) + 1
    powers = np.concatenate(([np.uint64(1)], np.full(max(len(text) - 1, 0), _MULTIPLIER))).cumprod()[: len(text)]
    sums = np.concatenate(([np.uint64(0)], ((text.astype(np.uint64) + np.uint64(1)) * powers).cumsum()))
    inverses = np.concatenate(([np.uint64(1)], np.full(max(len(text) - 1, 0), _INVERSE))).cumprod()
    return _mixed((sums[ends] - sums[starts]) * inverses[starts])


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    return values ^ values >> np.uint64(27)


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Similarity of two sets, each sorted and distinct; 0 for empty ones."""
    small, large = sorted((len(a), len(b)))
    if small < THRESHOLD * large:
        return small / large  # an upper bound, which is below the threshold
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(small + large - common, 1)


class NearDuplicates:
    """Takes documents one by one, then clusters them. folder: for the unnamed files. Raises OSError if it is full."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self._shingles, self._bands = (
            self._files.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115 - the stack closes it
            for _ in range(2)
        )
        self._offsets = array("q", [0])
        self._waiting: list[NDArray[np.uint64]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._files.close()

    def add(self, content: bytes) -> None:
        hashes = shingles(content)
        self._shingles.write(hashes.tobytes())
        self._offsets.append(self._offsets[-1] + len(hashes))
        self._waiting.append(hashes)
        waiting = len(self._waiting)
        if waiting == BATCH_DOCUMENTS or self._offsets[-1] - self._offsets[-1 - waiting] >= BATCH_SHINGLES:
            self._sign()

    def clusters(self) -> NDArray[np.int64]:
        """int64 [documents]: the number of the first document of each one's cluster."""
        self._sign()
        documents = len(self._offsets) - 1
        parents = list(range(documents))
        if not self._offsets[-1]:
            return np.array(parents, dtype=np.int64)
        self._shingles.flush()
        self._bands.flush()
        sets = np.memmap(self._shingles, dtype=np.uint64, mode="r")
        bands = np.memmap(self._bands, dtype=np.uint64, mode="r", shape=(documents, BANDS))
        for band in range(BANDS):
            for members in _equal(np.array(bands[:, band])):
                self._join(members, parents, sets)
        return np.array([_root(parents, number) for number in range(documents)], dtype=np.int64)

    def _join(self, members: list[int], parents: list[int], sets: NDArray[np.uint64]) -> None:
        if len({_root(parents, number) for number in members}) == 1:  # as for many copies, after their first band
            return
        for place, number in enumerate(members):
            for other in members[max(0, place - COMPARED_IN_A_BAND) : place]:
                roots = sorted((_root(parents, number), _root(parents, other)))
                if roots[0] != roots[1] and jaccard(self._set(sets, number), self._set(sets, other)) >= THRESHOLD:
                    parents[roots[1]] = roots[0]

    def _set(self, sets: NDArray[np.uint64], number: int) -> NDArray[np.uint64]:
        return sets[self._offsets[number] : self._offsets[number + 1]]

    def _sign(self) -> None:
        """Write the band hashes of the waiting documents."""
        if not self._waiting:
            return
        from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue] - its extension module has no types

        ends = np.cumsum([0, *map(len, self._waiting)], dtype=np.uint64)
        signatures = RMinHash.digest_matrix_from_flat_token_hashes(
            np.concatenate(self._waiting), ends, BANDS * ROWS, SEED
        )
        rows = np.array(signatures.to_rows(), dtype=np.uint64).reshape(-1, BANDS, ROWS)
        hashes = np.zeros(rows.shape[:2], dtype=np.uint64)
        for row in range(ROWS):
            hashes = _mixed(hashes * _MULTIPLIER + rows[:, :, row])
        # A document without shingles has no near-duplicates, so it gets a unique value.
        empty = np.flatnonzero(np.diff(ends) == 0)
        hashes[empty] = (len(self._offsets) - 1 - len(self._waiting) + empty)[:, None]
        self._bands.write(hashes.tobytes())
        self._waiting = []


def _equal(values: NDArray[np.uint64]) -> list[list[int]]:
    """Groups of several documents, by number, that have the same value."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order])) + 1
    return [group.tolist() for group in np.split(order, edges) if len(group) > 1]


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
