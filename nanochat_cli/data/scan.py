"""The first pass over a corpus: which documents a data set takes, which of them it holds out, and a sample of the text.

Memory is bounded by `tokenizer.train_bytes` and a few hundred bytes per document.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.schema import Config
from nanochat_cli.data import split
from nanochat_cli.data.contamination import RUN_WORDS, ProblemRuns
from nanochat_cli.data.corpus import NAMED, Corpus
from nanochat_cli.data.documents import Document, printable
from nanochat_cli.data.manifest import ContaminationInfo, NearDuplicatesInfo
from nanochat_cli.data.near_duplicates import NearDuplicates
from nanochat_cli.data.text_sample import TextSample
from nanochat_cli.data.word_runs import words_of
from nanochat_cli.errors import DataError
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter

COPY, NEAR = "copy of another document", "near-duplicate of another document"
FAMILIES = 5
"""The largest families of duplicates that are reported."""


@dataclass
class Scan:
    """taken: bool [documents read], those that the data set holds; held_out: the keys of those held out.

    size: bytes of those taken; content: hash of all that was read; left_out: documents by reason; families: the number
    of a document that was taken → how many it stands for.
    """

    taken: NDArray[np.bool_]
    held_out: set[int]
    size: int
    content: str
    sample: list[bytes]
    near_duplicates: NearDuplicatesInfo
    contamination: ContaminationInfo | None
    left_out: Counter[str]
    families: dict[int, int]


def scan(corpus: Corpus, folder: Path, config: Config, reporter: Reporter) -> Scan:
    """Read everything. folder: for temporary files. Raises DataError unless two different documents are left."""
    with NearDuplicates(folder) as near_duplicates:
        read = _Reading(config, near_duplicates)
        limit = config.data.max_bytes
        with reporter.progress("reading", total=known_size(corpus, limit), unit="B") as progress:
            for document in bounded(corpus, limit):
                read.add(document)
                progress.advance(len(document.content))
        keys, sizes = np.array(read.keys, dtype=np.uint64), np.array(read.sizes, dtype=np.int64)
        distinct = len(np.unique(keys))
        if distinct < 2:
            raise DataError(printable(f"{corpus.source}: {_too_few(corpus, read)}"))
        clusters = near_duplicates.clusters()
        kept = _kept(corpus, near_duplicates, config.data.dedup, reporter)
    chosen = kept == np.arange(len(kept))
    parts = np.array(read.parts, dtype=np.int64)
    held_out = _held_out(
        corpus, keys[chosen], sizes[chosen], clusters[chosen], parts[chosen], config.data.val_fraction, reporter
    )
    numbers = np.array(read.numbers, dtype=np.int64)
    taken = np.zeros(read.documents, dtype=bool)
    taken[numbers[chosen]] = True
    duplicates = int((~chosen).sum())
    copies = min(duplicates, len(keys) - distinct)
    left_out = Counter({COPY: copies, NEAR: duplicates - copies}) + read.left_out
    members = np.unique(clusters, return_counts=True)[1]
    stands_for = np.bincount(kept[~chosen], minlength=len(kept))
    return Scan(
        taken=taken,
        held_out=held_out,
        size=int(sizes[chosen].sum()),
        content=read.digest.hexdigest(),
        sample=read.sample.documents(held_out.union(np.setdiff1d(keys[~chosen], keys[chosen]).tolist())),
        near_duplicates=NearDuplicatesInfo(
            clusters=int((members > 1).sum()), documents=int(members[members > 1].sum())
        ),
        contamination=read.contamination(taken),
        left_out=left_out,
        families={
            int(numbers[place]): int(stands_for[place])
            for place in np.argsort(-stands_for, kind="stable")[:FAMILIES]
            if stands_for[place]
        },
    )


class _Reading:
    """Counts and hashes documents as they are read; contaminated ones go no further if they are to be left out."""

    def __init__(self, config: Config, near_duplicates: NearDuplicates) -> None:
        self._mode = config.data.contamination
        self._copies = config.data.dedup == "none"
        self._near_duplicates = near_duplicates
        self._problems = None if self._mode == "off" else ProblemRuns()
        self._contaminated: dict[int, tuple[str, list[str]]] = {}  # number → name, and the sets
        self.sample = TextSample(config.tokenizer.train_bytes if config.tokenizer.path is None else 0)
        self.documents = 0
        self.numbers, self.keys, self.sizes, self.parts = array("q"), array("Q"), array("q"), array("B")
        self.left_out: Counter[str] = Counter()
        self.digest = hashlib.sha256()

    def add(self, document: Document) -> None:
        number, self.documents = self.documents, self.documents + 1
        key = split.split_key(document.content)
        self.digest.update(key.to_bytes(8, "big"))
        if document.tokens is not None:
            self.digest.update(document.tokens.tobytes())
        words = words_of(document.content)
        if self._problems is not None and (sets := self._problems.shared_with(words)):
            self._contaminated[number] = (document.id, sets)
            if self._mode == "remove":
                self.left_out[f"shares {RUN_WORDS} words in a row with a problem"] += 1
                return
        self.numbers.append(number)
        self.keys.append(key)
        self.sizes.append(len(document.content))
        self.parts.append(document.part)
        is_new = self._near_duplicates.add(key, words.hashes)
        if self.sample.limit and (is_new or self._copies):
            self.sample.offer(key, document.content)

    def contamination(self, taken: NDArray[np.bool_]) -> ContaminationInfo | None:
        if self._problems is None:
            return None
        removed = self._mode == "remove"
        found = [found for number, found in self._contaminated.items() if removed or taken[number]]
        return ContaminationInfo(
            documents={name: sum(name in sets for _, sets in found) for name in self._problems.names},
            left_out=removed,
            first=[printable(name) for name, _ in found[:NAMED]],
        )


def _kept(corpus: Corpus, near_duplicates: NearDuplicates, dedup: str, reporter: Reporter) -> NDArray[np.int64]:
    """int64 [documents]: the number of the document that stands for each one."""
    if dedup == "near":
        kept = near_duplicates.represented(near=True)
        if len(np.unique(kept)) > 1:
            return kept
        reporter.warn(f"{corpus.source}: all documents are near-duplicates of one, so only copies are left out")
    kept = near_duplicates.represented(near=False)
    return np.arange(len(kept)) if dedup == "none" else kept


def _held_out(
    corpus: Corpus,
    keys: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    clusters: NDArray[np.int64],
    parts: NDArray[np.int64],
    val_fraction: float,
    reporter: Reporter,
) -> set[int]:
    if corpus.parts:
        return _held_out_of_parts(corpus, keys, sizes, clusters, parts, val_fraction, reporter)
    held_out = split.choose_held_out(keys, sizes, clusters, val_fraction)
    if held_out is None:
        reporter.warn(
            f"{corpus.source}: every document is a near-duplicate of another, so some have twins on both sides: "
            "held-out figures will look too good"
        )
        contents = np.unique(keys, return_inverse=True)[1]
        held_out = split.choose_held_out(keys, sizes, contents, val_fraction)
        assert held_out is not None, "there are two different documents"
    return held_out


def _held_out_of_parts(
    corpus: Corpus,
    keys: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    clusters: NDArray[np.int64],
    parts: NDArray[np.int64],
    val_fraction: float,
    reporter: Reporter,
) -> set[int]:
    """The share of each source by itself; a cluster belongs to the source of its document with the smallest key."""
    by_key = np.argsort(keys)
    names, firsts = np.unique(clusters[by_key], return_index=True)
    home = parts[by_key[firsts]][np.searchsorted(names, clusters)]
    held_out: set[int] = set()
    for number, part in enumerate(corpus.parts):
        own = home == number
        chosen = split.choose_held_out(keys[own], sizes[own], clusters[own], val_fraction) if own.any() else None
        if chosen is None:
            reporter.warn(f"{part.name}: nothing of it is held out, since all of it is one cluster of near-duplicates")
        else:
            held_out |= chosen
    if not held_out:
        raise DataError(f"{corpus.source}: nothing can be held out for validation; give more text or more files")
    return held_out


def _too_few(corpus: Corpus, read: _Reading) -> str:
    reasons = f" (left out: {corpus.what_was_left_out()})" if corpus.skipped else ""
    if removed := sum(read.left_out.values()):
        reasons += f" (and {counted(removed, 'document')} that give away problems)"
    return (
        f"only one distinct document ({sum(read.sizes)} bytes){reasons}, but one must be held out for validation; "
        "give more text or more files"
    )


def bounded(documents: Iterable[Document], limit: int | None) -> Iterator[Document]:
    """Documents up to the first that reaches `limit` bytes in total."""
    size = 0
    for document in documents:
        yield document
        size += len(document.content)
        if limit is not None and size >= limit:
            return


def known_size(corpus: Corpus, limit: int | None) -> int | None:
    sizes = [size for size in (corpus.size_bytes, limit) if size is not None]
    return min(sizes) if sizes else None
