"""pass@k against its definition: exact fractions, all subsets, and simulation."""

import itertools
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from nanochat_cli.errors import ConfigError
from nanochat_cli.evaluation.pass_at_k import mean_pass_at_k, pass_at_k


def exact(n: int, c: int, k: int) -> Fraction:
    """1 − ∏ (1 − k / i) for i from n − c + 1 to n: the product form of the paper, in fractions."""
    if n - c < k:
        return Fraction(1)
    product = Fraction(1)
    for i in range(n - c + 1, n + 1):
        product *= 1 - Fraction(k, i)
    return 1 - product


def test_it_is_the_float_nearest_to_the_product_form():
    generator = random.Random(3)
    cases = [(n, c, k) for n in range(1, 13) for c in range(n + 1) for k in range(1, n + 1)]
    for _ in range(300):
        n = generator.randint(1, 400)
        cases.append((n, generator.randint(0, n), generator.randint(1, n)))
    for n, c, k in [*cases, (10_000, 1, 100), (10_000, 9_999, 1)]:
        assert pass_at_k(n, c, k) == float(exact(n, c, k)), (n, c, k)


def test_it_is_the_share_of_the_subsets_that_hold_a_pass():
    for n, c, k in [(5, 2, 3), (6, 1, 2), (7, 4, 2), (4, 4, 4), (6, 0, 3)]:
        subsets = list(itertools.combinations(range(n), k))
        assert pass_at_k(n, c, k) == sum(min(subset) < c for subset in subsets) / len(subsets)


def test_it_is_unbiased():
    """The mean over many draws of n completions is 1 − (1 − p)^k, which 1 − (1 − c/n)^k overestimates here."""
    p, n, k, draws = 0.3, 10, 4, 20_000
    counts = np.random.default_rng(11).binomial(n, p, size=draws)
    values = np.array([pass_at_k(n, int(c), k) for c in range(n + 1)])[counts]
    truth = 1 - (1 - p) ** k
    error = values.std() / math.sqrt(draws)
    assert abs(values.mean() - truth) < 4 * error
    plug_in = 1 - (1 - counts / n) ** k
    assert abs(plug_in.mean() - truth) > 4 * error


def test_pass_at_one_is_the_share_that_passed():
    assert [pass_at_k(8, c, 1) for c in range(9)] == [c / 8 for c in range(9)]


def test_a_tiny_rate_is_not_rounded_away():
    # In floats 1 − C(n − 1, k) / C(n, k) would have an error of the size of 1e-16.
    assert pass_at_k(10**9, 1, 1) == 1e-9


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (0, 0, 1), (5, 5, 0), (5, 1, -1)])
def test_too_few_completions_and_no_k_are_refused(n, c, k):
    with pytest.raises(ConfigError) as caught:
        pass_at_k(n, c, k)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("c", [-1, 6])
def test_impossible_counts_are_refused(c):
    with pytest.raises(ValueError, match="of 5 completions"):
        pass_at_k(5, c, 1)


def test_the_mean_is_over_problems_whatever_the_number_of_their_completions():
    counts = {"a": (2, 1), "b": (10, 0), "c": (4, 4)}
    one, two = mean_pass_at_k(counts, [1, 2])
    assert (one.k, one.value, one.problems) == (1, pytest.approx((0.5 + 0 + 1) / 3), 3)
    assert two.value == pytest.approx((1 + 0 + 1) / 3)
    assert mean_pass_at_k({"a": (4, 1)})[0].interval is None


def test_the_interval_covers_the_mean_of_the_population():
    """Problems drawn from a population with a mean rate of 0.4: 95 % intervals cover it in about 95 % of the cases."""
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        rates = generator.beta(2, 3, size=40)
        counts = {str(i): (10, int(generator.binomial(10, rate))) for i, rate in enumerate(rates)}
        (found,) = mean_pass_at_k(counts)
        assert found.interval is not None
        covered += found.interval[0] <= 0.4 <= found.interval[1]
    assert 180 <= covered <= 198  # binomial(200, 0.95): 190 ± 3; the bootstrap is a little narrow


def test_a_problem_with_too_few_completions_is_refused_by_name():
    with pytest.raises(ConfigError, match="b: pass@4 needs at least 4 completions, there are 3"):
        mean_pass_at_k({"a": (4, 1), "b": (3, 3)}, [1, 4])
    with pytest.raises(ConfigError, match="problem set is empty"):
        mean_pass_at_k({})
