"""Near-duplicates by the runs of five words that documents share: clusters of them, and which of them to keep.

MinHash signatures by `rensa`, cut into bands, propose pairs (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is checked by its exact Jaccard similarity, and pairs that pass are joined (union-find), so a cluster is what
chains of near-duplicates connect. Documents are taken in the order of their keys (hashes of the content), so that
nothing depends on the order in which they came. Memory is a few hundred bytes per document: signatures and shingles are
in unnamed files, which the system removes with the process. Knows bytes; knows nothing of splits or tokens.
"""

import tempfile
from array import array
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.word_runs import combined, runs_of, words_of

SHINGLE_WORDS = 5
THRESHOLD = 0.5
"""Smallest Jaccard similarity of the shingles of near-duplicates, which stay on one side of the split."""
REPEATED = 0.7
"""Smallest similarity to a document that is kept at which another one only repeats it."""
# A pair of similarity s shares a band with probability 1 - (1 - s⁴)⁶⁴: 98.4 % at 0.5, 99.98 % at 0.6, 0.04 % at 0.05.
BANDS, ROWS = 64, 4
SEED = 0
# Signatures, of some kilobytes each, are computed for about so many shingles or documents at once.
BATCH_SHINGLES = 1 << 20
BATCH_DOCUMENTS = 256
# A document is compared with so many others per band: this bounds the work on boilerplate that thousands share.
COMPARED_IN_A_BAND = 16
# In a cluster it is compared with the so many likeliest of the so many last ones that are kept.
LIKELIEST, LAST_KEPT = 16, 4096


def shingles(content: bytes) -> NDArray[np.uint64]:
    """Sorted distinct hashes of all runs of SHINGLE_WORDS words; one for a shorter text, none for blanks."""
    return _shingles(words_of(content).hashes)


def _shingles(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    if 0 < len(words) < SHINGLE_WORDS:
        words = np.concatenate((words, np.zeros(SHINGLE_WORDS - len(words), np.uint64)))
    return np.unique(runs_of(words, SHINGLE_WORDS))


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
        # Copies are one text: the text of every document, and of every text its first document and its key.
        self._text_of_key: dict[int, int] = {}
        self._texts, self._first, self._keys = array("q"), array("q"), array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self._files.close()

    def add(self, key: int, words: NDArray[np.uint64]) -> bool:
        """The next document: a key that only its copies share, and the hashes of its words (`words_of`).

        Returns whether it is the first of its kind.
        """
        text = self._text_of_key.setdefault(key, len(self._keys))
        self._texts.append(text)
        if text < len(self._keys):
            return False
        self._first.append(len(self._texts) - 1)
        self._keys.append(key)
        hashes = _shingles(words)
        self._shingles.write(hashes.tobytes())
        self._offsets.append(self._offsets[-1] + len(hashes))
        self._waiting.append(hashes)
        waiting = len(self._waiting)
        if waiting == BATCH_DOCUMENTS or self._offsets[-1] - self._offsets[-1 - waiting] >= BATCH_SHINGLES:
            self._sign()
        return True

    def clusters(self) -> NDArray[np.int64]:
        """int64 [documents]: the number of the first document of each one's cluster."""
        return np.array(self._first, dtype=np.int64)[self._clusters_of_texts[np.array(self._texts, dtype=np.int64)]]

    def represented(self, *, near: bool) -> NDArray[np.int64]:
        """int64 [documents]: the number of the document to keep for each one: its own if that is kept.

        A copy is represented by the first of its kind. near: in the order of keys, a document is kept unless its
        similarity to one that is kept already is at least REPEATED.
        """
        representatives = np.arange(len(self._keys))
        if near:
            clusters = self._clusters_of_texts
            by_key = np.argsort(np.array(self._keys, dtype=np.uint64))
            for members in _equal(clusters, by_key):
                representatives[members] = self._representatives(members)
        return np.array(self._first, dtype=np.int64)[representatives[np.array(self._texts, dtype=np.int64)]]

    @cached_property
    def _clusters_of_texts(self) -> NDArray[np.int64]:
        """int64 [texts]: the smallest number in each one's cluster. Read after the last document."""
        self._sign()
        parents = list(range(len(self._keys)))
        if not self._offsets[-1]:
            return np.array(parents, dtype=np.int64)
        sets, bands = self._mapped()
        by_key = np.argsort(np.array(self._keys, dtype=np.uint64))
        for band in range(BANDS):
            for members in _equal(np.array(bands[:, band]), by_key):
                self._join(members, parents, sets)
        return np.array([_root(parents, number) for number in range(len(parents))], dtype=np.int64)

    def _mapped(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """All shingles, and uint64 [texts, BANDS]."""
        self._shingles.flush()
        self._bands.flush()
        sets = np.memmap(self._shingles, dtype=np.uint64, mode="r")
        return sets, np.memmap(self._bands, dtype=np.uint64, mode="r", shape=(len(self._keys), BANDS))

    def _join(self, members: list[int], parents: list[int], sets: NDArray[np.uint64]) -> None:
        if len({_root(parents, number) for number in members}) == 1:  # as for many copies, after their first band
            return
        for place, number in enumerate(members):
            for other in members[max(0, place - COMPARED_IN_A_BAND) : place]:
                roots = sorted((_root(parents, number), _root(parents, other)))
                if roots[0] != roots[1] and jaccard(self._set(sets, number), self._set(sets, other)) >= THRESHOLD:
                    parents[roots[1]] = roots[0]

    def _representatives(self, members: list[int]) -> list[int]:
        """The text to keep for each of a cluster. Those that share most bands are compared: they are the likeliest."""
        sets, bands = self._mapped()
        slots: list[int] = []  # texts that are kept; the oldest is replaced first
        rows = np.empty((min(len(members), LAST_KEPT), BANDS), dtype=np.uint64)
        chosen: list[int] = []
        n_kept = 0
        for number in members:
            shared = (rows[: len(slots)] == bands[number]).sum(axis=1)
            likely = [slots[slot] for slot in np.argsort(-shared, kind="stable")[:LIKELIEST] if shared[slot]]
            mine = self._set(sets, number)
            repeated = (text for text in likely if jaccard(self._set(sets, text), mine) >= REPEATED)
            chosen.append(next(repeated, number))
            if chosen[-1] == number:
                slot = n_kept % LAST_KEPT
                slots[slot : slot + 1], rows[slot] = [number], bands[number]
                n_kept += 1
        return chosen

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
            hashes = combined(hashes, rows[:, :, row])
        # A document without shingles has no near-duplicates, so it gets a unique value.
        empty = np.flatnonzero(np.diff(ends) == 0)
        hashes[empty] = (len(self._offsets) - 1 - len(self._waiting) + empty)[:, None]
        self._bands.write(hashes.tobytes())
        self._waiting = []


def _equal(values: NDArray[np.integer], by_key: NDArray[np.int64]) -> list[list[int]]:
    """Groups of several documents, by number in the order of keys, that have the same value."""
    order = by_key[np.argsort(values[by_key], kind="stable")]
    edges = np.flatnonzero(np.diff(values[order])) + 1
    return [group.tolist() for group in np.split(order, edges) if len(group) > 1]


def _root(parents: list[int], number: int) -> int:
    while parents[number] != number:
        parents[number] = parents[parents[number]]
        number = parents[number]
    return number
