"""Intervals of shares against the definition of the score test, published figures, and exact coverage."""

import math
from fractions import Fraction

import pytest

from nanochat_cli.evaluation.pass_at_k import mean_pass_at_k
from nanochat_cli.evaluation.share_intervals import difference_interval, share_interval, wilson_interval

Z = 1.959963984540054


def binomial(count: int, share: Fraction) -> list[Fraction]:
    """Probabilities of 0 … count."""
    return [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]


@pytest.mark.parametrize(("solved", "count"), [(0, 3), (3, 3), (0, 43), (1, 10), (7, 20), (500, 1000)])
def test_its_ends_are_the_shares_that_a_score_test_just_does_not_reject(solved, count):
    mean = solved / count
    for end in wilson_interval(mean, count):
        if 0 < end < 1:
            assert abs(mean - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(Z, rel=1e-9)
        else:
            assert end == mean


def test_nothing_solved_does_not_prove_that_nothing_can_be():
    (found,) = mean_pass_at_k(dict.fromkeys("abc", (4, 0)))
    assert found.interval == (0, pytest.approx(Z**2 / (3 + Z**2)))
    (found,) = mean_pass_at_k({str(i): (10, 0) for i in range(43)})
    assert found.interval is not None
    assert 0.05 < found.interval[1] < 0.1  # the rule of three says 3 / 43 = 0.07
    (found,) = mean_pass_at_k({str(i): (10, 10) for i in range(43)})
    assert found.interval is not None
    assert found.interval[1] == 1 > found.interval[0] > 0.9


@pytest.mark.parametrize("count", [3, 8, 20])
def test_it_covers_the_truth_in_95_of_100_cases_on_average_over_all_truths(count):
    intervals = [share_interval([1.0] * solved + [0.0] * (count - solved)) for solved in range(count + 1)]
    coverage = []
    for step in range(1, 100):
        truth = Fraction(step, 100)
        chances = binomial(count, truth)
        coverage.append(
            sum(p for p, ends in zip(chances, intervals, strict=True) if ends and ends[0] <= truth <= ends[1])
        )
    assert 0.94 < float(sum(coverage)) / 99 < 0.98
    assert float(min(coverage)) > 0.8


def test_shares_between_0_and_1_vary_less_so_that_it_covers_them_too():
    ends = share_interval([0.1, 0.2, 0.15])
    assert ends is not None
    assert ends[0] < 0.1
    assert ends[1] > 0.2


def test_a_difference_has_the_published_ends():
    """Newcombe 1998, table II: pairs (both, first only, second only, none) and method 10."""
    for (both, one, other, none), ends in {
        (36, 12, 2, 0): (0.0569, 0.3404),
        (54, 0, 0, 0): (-0.0664, 0.0664),
    }.items():
        first = [1.0] * (both + one) + [0.0] * (other + none)
        second = [1.0] * both + [0.0] * one + [1.0] * other + [0.0] * none
        assert difference_interval(first, second) == pytest.approx(ends, abs=5e-5)


def test_unchanged_problems_do_not_prove_that_none_would_change():
    for values in ([0.0] * 43, [1.0] * 20 + [0.0] * 23, [0.5] * 43):
        ends = difference_interval(values, values)
        assert ends is not None
        assert ends[0] < -0.02
        assert ends[1] > 0.02


def test_one_problem_has_no_interval():
    assert share_interval([1.0]) is None
    assert difference_interval([1.0], [0.0]) is None
