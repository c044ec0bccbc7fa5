"""Batches: the order is a permutation, a pure function of seed and index, and the same for any number of ranks."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.data.batches import Batches, evaluation_batches, evaluation_windows, permuted
from nanochat_cli.data.shards import Shard, ShardWriter, TokenStream
from nanochat_cli.errors import DataError

EOS_ID = 7


def make_stream(folder: Path, n_tokens: int, shard_tokens: int = 50) -> TokenStream:
    """Tokens 0, 1, 2, … as documents of random length over several shards, so that a token is its own position."""
    rng = random.Random(n_tokens)
    with ShardWriter(folder, "train", 70_000, max_tokens=shard_tokens) as writer:
        start = 0
        while start < n_tokens:
            stop = min(start + rng.randrange(1, 30), n_tokens)
            writer.add(np.arange(start, stop), stop - start)
            start = stop
        info = writer.finish()
    return TokenStream([Shard(folder / shard.file, shard) for shard in info.shards], EOS_ID)


@given(size=st.integers(1, 700), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_the_order_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(place, size, seed, epoch) for place in range(size)) == list(range(size))


def test_the_order_looks_random_and_changes_with_seed_and_epoch() -> None:
    size = 4000
    orders = {
        (seed, epoch): np.array([permuted(place, size, seed, epoch) for place in range(size)])
        for seed, epoch in ((1, 0), (1, 1), (2, 0), (1337, 0))
    }
    keys = list(orders)
    for number, key in enumerate(keys):
        # Under a random permutation each of these correlations has standard deviation 1/sqrt(4000) = 0.016.
        assert abs(np.corrcoef(orders[key], np.arange(size))[0, 1]) < 0.08
        assert abs(np.corrcoef(orders[key][1:], orders[key][:-1])[0, 1]) < 0.08
        for other in keys[number + 1 :]:
            assert abs(np.corrcoef(orders[key], orders[other])[0, 1]) < 0.08


def test_every_place_is_hit_equally_often_over_seeds() -> None:
    counts = np.zeros((5, 5), dtype=int)
    for seed in range(2000):
        for place in range(5):
            counts[place, permuted(place, 5, seed, 0)] += 1
    # 2000 draws with p = 1/5: mean 400, standard deviation 18; five of them bound all 25 cells.
    assert np.abs(counts - 400).max() < 90


def test_the_order_is_pinned_so_that_old_runs_resume_alike() -> None:
    assert [permuted(place, 10, 1337, 0) for place in range(10)] == [0, 1, 8, 4, 5, 6, 7, 2, 3, 9]


def test_an_epoch_has_every_window_once_and_targets_follow_inputs(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 203)
    batches = Batches(stream, batch_size=5, seq_len=8, seed=3)
    assert batches.windows == 25
    starts = []
    for index in range(5):
        inputs, targets = batches.batch(index)
        assert inputs.shape == targets.shape == (5, 8)
        assert inputs.dtype == targets.dtype == np.int64
        # The stream counts up, so a row is its start and the eight tokens after it.
        assert (inputs == inputs[:, :1] + np.arange(8)).all()
        assert (targets == inputs + 1).all()
        starts += inputs[:, 0].tolist()
    assert sorted(starts) == [8 * window for window in range(25)]
    assert batches.epoch(5) == 1.0
    second_epoch = [row[0] for index in range(5, 10) for row in batches.batch(index)[0].tolist()]
    assert sorted(second_epoch) == sorted(starts)
    assert second_epoch != starts


def test_a_batch_depends_on_seed_and_index_only(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 500)
    forwards = Batches(stream, 4, 16, seed=9)
    expected = [forwards.batch(index)[0] for index in range(30)]
    backwards = Batches(stream, 4, 16, seed=9)
    for index in reversed(range(30)):
        np.testing.assert_array_equal(backwards.batch(index)[0], expected[index])
    other = Batches(stream, 4, 16, seed=10)
    assert any((other.batch(index)[0] != expected[index]).any() for index in range(3))


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_ranks_share_the_same_global_batch(tmp_path: Path, ranks: int) -> None:
    stream = make_stream(tmp_path, 500)
    whole = Batches(stream, 6, 16, seed=9, shift=5)
    rows = 6 // ranks
    parts = [Batches(stream, rows, 16, seed=9, shift=5 + rank * rows, stride=6) for rank in range(ranks)]
    for index in (0, 1, 17):
        for part in (0, 1):
            joined = np.concatenate([rank.batch(index)[part] for rank in parts])
            np.testing.assert_array_equal(joined, whole.batch(index)[part])


def test_smaller_micro_batches_are_the_same_sequence_of_rows(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 500)
    large, small = Batches(stream, 6, 16, seed=9), Batches(stream, 2, 16, seed=9)
    for index in range(12):
        parts = np.concatenate([small.batch(3 * index + part)[0] for part in range(3)])
        np.testing.assert_array_equal(parts, large.batch(index)[0])


def test_a_run_that_continues_with_other_batches_reads_what_comes_next(tmp_path: Path) -> None:
    """Three batches of two windows were read; batch 3 of six windows is what batches 3, 4 and 5 of two would be."""
    stream = make_stream(tmp_path, 500)
    small, large = Batches(stream, 2, 16, seed=9), Batches(stream, 6, 16, seed=9, shift=3 * 2 - 3 * 6)
    expected = np.concatenate([small.batch(index)[0] for index in (3, 4, 5)])
    np.testing.assert_array_equal(large.batch(3)[0], expected)


def test_there_are_as_many_evaluation_batches_as_announced(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 203)
    for bound in (None, 1, 40, 100, 10_000):
        windows = evaluation_windows(stream, 16, bound)
        found = list(evaluation_batches(stream, 4, 16, bound))
        assert len(found) == -(-windows // 4)
        assert sum(int((targets[:, 0] >= 0).sum()) for _, targets in found) == windows


def test_a_sequence_longer_than_the_corpus_is_refused(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 100)
    assert Batches(stream, 1, 99, seed=0).windows == 1
    with pytest.raises(DataError, match=r"100 training tokens.*train\.seq_len = 100"):
        Batches(stream, 1, 100, seed=0)


@pytest.mark.parametrize("n_tokens", [2, 16, 17, 64, 65, 66, 203])
def test_evaluation_scores_every_token_but_the_first_once_in_order(tmp_path: Path, n_tokens: int) -> None:
    batches = list(evaluation_batches(make_stream(tmp_path, n_tokens), batch_size=4, seq_len=16))
    assert all(inputs.shape == targets.shape == (4, 16) for inputs, targets in batches)
    targets = np.concatenate([targets.ravel() for _, targets in batches])
    inputs = np.concatenate([inputs.ravel() for inputs, _ in batches])
    scored = targets != -100
    np.testing.assert_array_equal(targets[scored], np.arange(1, n_tokens))
    np.testing.assert_array_equal(inputs[scored], np.arange(n_tokens - 1))
    assert (inputs[~scored] == EOS_ID).all()
    assert len(batches) == -(-(n_tokens - 1) // 64)


@pytest.mark.parametrize("bound", [16, 70, 100, 201])
def test_a_bounded_evaluation_reads_windows_spread_over_the_whole_stream(tmp_path: Path, bound: int) -> None:
    batches = list(evaluation_batches(make_stream(tmp_path, 203), batch_size=4, seq_len=16, max_tokens=bound))
    rows = [row[row != -100] for _, targets in batches for row in targets if (row != -100).any()]
    starts = [int(row[0]) - 1 for row in rows]
    assert bound - 16 < sum(len(row) for row in rows) <= bound
    assert all(start % 16 == 0 for start in starts)
    assert len(set(starts)) == len(starts)
    # All 13 windows in as many equal parts as were read: each that was read holds the middle of its part.
    middles = [(number + 0.5) * 13 * 16 / len(starts) for number in range(len(starts))]
    assert all(start <= middle < start + 16 for start, middle in zip(starts, middles, strict=True))


def test_a_stream_reads_across_shards_like_one_array(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 203, shard_tokens=20)
    whole = np.arange(203)
    rng = random.Random(0)
    for _ in range(200):
        start, stop = rng.randrange(-250, 250), rng.randrange(-250, 250)
        np.testing.assert_array_equal(stream[start:stop], whole[start:stop])
    np.testing.assert_array_equal(stream[:], whole)
    with pytest.raises(ValueError, match="step 1"):
        stream[::2]
