"""Paired comparisons have known values, and their intervals cover the truth as often as they claim."""

import math

import numpy as np
import pytest

from nanochat_cli.report.statistics import bootstrap_interval, compare, interval_name, seed_interval


def test_a_ratio_above_one_is_better_whichever_way_the_measure_goes():
    assert compare([200.0, 400.0], [100.0, 200.0], "ratio").value == pytest.approx(2)
    assert compare([50.0, 100.0], [100.0, 200.0], "ratio", smaller_is_better=True).value == pytest.approx(2)


def test_a_ratio_and_its_inverse_say_the_same():
    ours, peers = [3.0, 1.0, 5.0], [1.0, 2.0, 4.0]
    there, back = compare(ours, peers, "ratio"), compare(peers, ours, "ratio")
    assert there.value * back.value == pytest.approx(1)
    assert there.interval is not None
    assert back.interval is not None
    assert there.interval[0] * back.interval[1] == pytest.approx(1)


def test_a_saving_is_one_minus_the_ratio_and_its_interval_is_in_order():
    found = compare([10.0, 30.0, 20.0], [100.0, 100.0, 100.0], "saving")
    assert found.value == pytest.approx(1 - (0.1 * 0.3 * 0.2) ** (1 / 3))
    assert found.interval is not None
    assert found.interval[0] < found.value < found.interval[1]


def test_a_difference_is_ours_minus_the_peer_s():
    found = compare([1.5, 1.7], [1.4, 1.8], "difference")
    assert (found.value, found.seeds) == (pytest.approx(0), 2)


def test_pairing_removes_what_seeds_have_in_common():
    seeds = np.random.default_rng(3).normal(0, 10, 12)
    ours, peers = (seeds + 1).tolist(), seeds.tolist()
    found = compare(ours, peers, "difference")
    assert found.value == pytest.approx(1)
    assert found.interval == (pytest.approx(1), pytest.approx(1))


def test_one_seed_has_no_interval():
    assert compare([2.0], [1.0], "ratio").interval is None
    assert bootstrap_interval([2.0]) is None


def test_three_seeds_never_reach_beyond_the_smallest_and_the_largest():
    assert bootstrap_interval([1.0, 2.0, 4.0]) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("seeds", "name"), [(2, "range of the seeds"), (5, "range of the seeds"), (6, "95 % interval")]
)
def test_below_six_seeds_the_interval_is_their_range_and_called_so(seeds, name):
    values = [float(n * n) for n in range(seeds)]
    assert interval_name(seeds) == name
    assert (seed_interval(values) == (min(values), max(values))) == (seeds < 6)


def test_the_same_values_give_the_same_interval():
    values = np.random.default_rng(0).normal(size=9).tolist()
    assert bootstrap_interval(values) == bootstrap_interval(values)


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_the_interval_of_many_values_is_that_of_the_normal_distribution(shift):
    values = np.random.default_rng(5).normal(shift, 2.0, 400)
    low, high = bootstrap_interval(values.tolist()) or (math.nan, math.nan)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


@pytest.mark.parametrize(("size", "lowest", "highest"), [(3, 0.65, 0.85), (40, 0.90, 0.97)])
def test_the_interval_covers_the_true_mean_as_often_as_the_number_of_seeds_allows(size, lowest, highest):
    # Of 3 normal values an interval from the smallest to the largest mean of resamples covers 75 %: P(all three on one
    # side) is 25 %. Of 40 it is close to its 95 %. 400 trials have a standard error of about 2 %.
    generator = np.random.default_rng(11)
    covered = 0
    for trial in range(400):
        found = bootstrap_interval(generator.normal(3.0, 1.0, size).tolist(), resamples=1000, seed=trial)
        assert found is not None
        covered += found[0] <= 3.0 <= found[1]
    assert lowest <= covered / 400 <= highest


@pytest.mark.parametrize(
    ("ours", "peers", "form"),
    [([], [], "ratio"), ([1.0], None, "ratio"), ([1.0, 2.0], [1.0], "saving"), ([0.0], [1.0], "ratio")],
)
def test_what_cannot_be_compared_is_an_error(ours, peers, form):
    with pytest.raises(ValueError, match=r"nothing|peer|positive"):
        compare(ours, peers, form)
