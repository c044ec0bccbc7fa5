"""Near-duplicates against a comparison of all pairs, and the split that keeps them together."""

import encodings
import itertools
import random
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from nanochat_cli.data import near_duplicates
from nanochat_cli.data.near_duplicates import REPEATED, NearDuplicates, shingles
from nanochat_cli.data.split import HASH_RANGE, LARGEST_SHARE, choose_held_out, split_key
from nanochat_cli.data.word_runs import words_of
from tests.data.corpora import random_text

WORDS = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\sA-Za-z0-9_\x80-\xff]")


@cache
def runs_of_words(content: bytes) -> frozenset[tuple[bytes, ...]]:
    """The definition, with Python's regular expressions and sets of tuples."""
    words = WORDS.findall(content)
    return frozenset(tuple(words[i : i + 5]) for i in range(max(len(words) - 4, 1 if words else 0)))


def similarity(a: bytes, b: bytes) -> float:
    first, second = runs_of_words(a), runs_of_words(b)
    return len(first & second) / max(len(first | second), 1)


def with_twins(seed: int) -> list[bytes]:
    """Documents, some of them with twins: a variable renamed, another header, lines left out, the same text again."""
    rng = random.Random(seed)
    documents = [random_text(rng, rng.randrange(300, 4000)) for _ in range(40)]
    documents += [text.replace("index", "position") for text in documents[:8]]
    documents += [
        f"# Copyright {year} of somebody else, all rights reserved\n" + documents[year] for year in range(6, 14)
    ]
    documents += ["".join(line for line in text.splitlines(True) if rng.random() > 0.08) for text in documents[10:16]]
    documents += [documents[3], "", " \n", "two words", "two words", "one"]
    rng.shuffle(documents)
    return [text.encode() for text in documents]


def clusters_of(documents: list[bytes], folder: Path) -> list[int]:
    with NearDuplicates(folder) as found:
        for content in documents:
            found.add(split_key(content), words_of(content).hashes)
        return found.clusters().tolist()


def represented(documents: list[bytes], folder: Path, *, near: bool = True) -> list[int]:
    with NearDuplicates(folder) as found:
        for content in documents:
            found.add(split_key(content), words_of(content).hashes)
        return found.represented(near=near).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_shingles_are_the_distinct_runs_of_five_words(seed: int) -> None:
    documents = with_twins(seed)
    for content in documents:
        assert len(shingles(content)) == len(runs_of_words(content))
    for a, b in itertools.combinations(documents[:12], 2):
        common = len(np.intersect1d(shingles(a), shingles(b)))
        assert common == len(runs_of_words(a) & runs_of_words(b))


@pytest.mark.parametrize("batch", [1, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_clusters_are_what_chains_of_similar_pairs_connect(
    seed: int, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_duplicates, "BATCH_SHINGLES", batch)
    documents = with_twins(seed)
    found = clusters_of(documents, tmp_path)
    similar = {pair: similarity(*(documents[i] for i in pair)) for pair in itertools.combinations(range(len(found)), 2)}
    # A pair just above the threshold may be missed, with a probability below 2 %; one well above it may not.
    assert all(found[a] == found[b] for (a, b), value in similar.items() if value >= 0.6)
    edges = {pair for pair, value in similar.items() if value >= 0.5}
    for name in set(found):
        members = {number for number, cluster in enumerate(found) if cluster == name}
        reached = {name}
        while more := {b for pair in edges for a, b in (pair, pair[::-1]) if a in reached and b not in reached}:
            reached |= more
        assert members <= reached
        assert name == min(members)
    assert sum(value >= 0.5 for value in similar.values()) > 15


def test_a_document_without_words_resembles_no_other(tmp_path: Path) -> None:
    assert clusters_of([b"", b" \n", b"\t"], tmp_path) == [0, 1, 2]
    assert clusters_of([b"", b"a b", b" ", b"a  b", b"a c"], tmp_path) == [0, 1, 2, 1, 4]


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    clusters_of(with_twins(0), tmp_path)
    assert not list(tmp_path.iterdir())


# -- which are left out ----------------------------------------------------------------------------------


def all_pairs_are_settled(documents: list[bytes], kept: list[int], missed: int = 0) -> None:
    """What is left out repeats the document that stands for it, and no two that are kept repeat each other."""
    for number, stands_for in enumerate(kept):
        assert kept[stands_for] == stands_for
        assert number == stands_for or similarity(documents[number], documents[stands_for]) >= REPEATED
    whole = [number for number, stands_for in enumerate(kept) if number == stands_for and documents[number].split()]
    repeating = [pair for pair in itertools.combinations(whole, 2) if similar(documents, *pair) >= REPEATED]
    assert len(repeating) <= missed


def similar(documents: list[bytes], a: int, b: int) -> float:
    sizes = sorted((len(documents[a]), len(documents[b])))
    return similarity(documents[a], documents[b]) if 2 * sizes[1] < 5 * sizes[0] else 0.0


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_repeats_a_document_that_is_kept_and_no_two_of_those_repeat_each_other(
    seed: int, tmp_path: Path
) -> None:
    documents = with_twins(seed)
    kept = represented(documents, tmp_path)
    all_pairs_are_settled(documents, kept)
    assert 10 < sum(number != stands_for for number, stands_for in enumerate(kept)) < 30


def test_real_files_that_resemble_each_other_are_settled_as_by_comparing_all_pairs(tmp_path: Path) -> None:
    documents = [path.read_bytes() for path in sorted(Path(encodings.__path__[0]).glob("*.py"))]
    kept = represented(documents, tmp_path)
    all_pairs_are_settled(documents, kept)
    assert sum(number != stands_for for number, stands_for in enumerate(kept)) >= 10


def test_the_document_that_is_kept_depends_neither_on_order_nor_on_the_limits_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = with_twins(7)
    # Many that share most of their text: more than are compared in a band.
    documents += [
        f"{documents[0].decode()}\nline {number} of {seed}".encode() for seed in range(5) for number in range(9)
    ]
    kept = {documents[number] for number in represented(documents, tmp_path)}
    for seed in range(4):
        random.Random(seed).shuffle(documents)
        assert {documents[number] for number in represented(documents, tmp_path)} == kept
    for limit in (1, 2, 64):
        monkeypatch.setattr(near_duplicates, "LAST_KEPT", limit)
        number_kept = len(set(represented(documents, tmp_path)))
        assert number_kept >= len(kept)
    assert number_kept == len(kept)


def test_copies_alone_are_left_out_when_near_duplicates_may_stay(tmp_path: Path) -> None:
    documents = with_twins(1)
    kept = represented(documents, tmp_path, near=False)
    assert kept == [documents.index(content) for content in documents]


# -- which are held out ----------------------------------------------------------------------------------


def test_about_the_requested_share_is_held_out_and_no_cluster_is_divided() -> None:
    rng = np.random.default_rng(0)
    keys = [split_key(str(number).encode()) for number in range(6000)]
    sizes = rng.integers(100, 5000, 6000).tolist()
    clusters = np.arange(6000)
    clusters[4000:] = rng.integers(0, 1000, 2000)  # a third of the documents belongs to clusters
    held_out = choose_held_out(keys, sizes, clusters, 0.1)
    assert held_out is not None
    sides = [key in held_out for key in keys]
    share = sum(size for size, side in zip(sizes, sides, strict=True) if side) / sum(sizes)
    assert share == pytest.approx(0.1, abs=0.02)
    assert len(set(zip(clusters.tolist(), sides, strict=True))) == len(set(clusters.tolist()))


def test_files_of_very_unequal_size_do_not_make_the_held_out_part_much_larger() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        keys = [split_key(f"{seed} {number}".encode()) for number in range(1500)]
        sizes = (rng.pareto(1.2, 1500) * 1000 + 100).astype(int).tolist()
        held_out = choose_held_out(keys, sizes, np.arange(1500), 0.02)
        assert held_out
        share = sum(size for key, size in zip(keys, sizes, strict=True) if key in held_out) / sum(sizes)
        assert share <= 1.25 * 0.02


def test_a_cluster_stays_on_its_side_when_others_are_added() -> None:
    keys = [split_key(str(number).encode()) for number in range(2000)]
    few = choose_held_out(keys[:500], [1] * 500, np.arange(500) // 2, 0.2)
    many = choose_held_out(keys, [1] * 2000, np.arange(2000) // 2, 0.2)
    assert few is not None
    assert many is not None
    assert few == many & set(keys[:500])


def test_a_family_of_files_too_large_for_the_held_out_part_is_trained_on() -> None:
    n_cluster = 20
    assert n_cluster > LARGEST_SHARE * 0.1 * 400
    for first in range(200):  # whatever the hash of its smallest document is
        keys = [split_key(f"{first} {number}".encode()) for number in range(400)]
        clusters = np.arange(400)
        clusters[:n_cluster] = 0
        held_out = choose_held_out(keys, [1] * 400, clusters, 0.1)
        assert held_out is not None
        assert not held_out & set(keys[:n_cluster])


@pytest.mark.parametrize("val_fraction", [0.0001, 0.02, 0.49])
def test_a_few_clusters_have_one_on_each_side_and_one_cannot_be_split(val_fraction: float) -> None:
    for first in range(50):
        keys = [split_key(f"{first} {number}".encode()) for number in range(6)]
        for clusters in ([0, 0, 0, 3, 3, 3], [0, 0, 0, 0, 0, 5], [0, 1, 2, 3, 4, 5]):
            held_out = choose_held_out(keys, [5] * 6, np.array(clusters), val_fraction)
            assert held_out is not None
            assert 0 < len(held_out) < 6
        assert choose_held_out(keys, [5] * 6, np.zeros(6, dtype=np.int64), val_fraction) is None
    assert HASH_RANGE == 2**64
