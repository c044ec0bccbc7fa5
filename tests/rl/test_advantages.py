"""Advantages against the standard library's statistics and in exact fractions."""

import random
import statistics
from fractions import Fraction

import pytest
import torch

from nanochat_cli.rl.advantages import EPSILON, group_advantages, informative


def rewards(groups: int, size: int, seed: int) -> torch.Tensor:
    return torch.rand(groups, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_an_advantage_is_the_reward_less_the_mean_of_its_group(size):
    values = rewards(5, size, seed=size)
    for row, result in zip(values.tolist(), group_advantages(values).tolist(), strict=True):
        exact = [Fraction(value) - sum(map(Fraction, row)) / size for value in row]
        assert result == pytest.approx([float(value) for value in exact], abs=1e-15)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_standardised_ones_are_divided_by_the_sample_deviation(size):
    values = rewards(5, size, seed=10 + size)
    for row, result in zip(values.tolist(), group_advantages(values, standardise=True).tolist(), strict=True):
        deviation = statistics.stdev(row) + EPSILON
        assert result == pytest.approx([(value - statistics.fmean(row)) / deviation for value in row], rel=1e-12)


@pytest.mark.parametrize("standardise", [False, True])
def test_equal_rewards_have_no_advantage(standardise):
    values = torch.full((3, 7), 0.1)  # whose float32 mean is not 0.1
    assert torch.equal(group_advantages(values, standardise=standardise), torch.zeros(3, 7))
    assert not informative(values).any()


def test_a_constant_added_to_all_rewards_changes_nothing_and_groups_do_not_mix():
    values = rewards(4, 8, seed=1)
    torch.testing.assert_close(group_advantages(values + 3), group_advantages(values))
    whole = group_advantages(values.view(2, 2, 8))
    for index in range(4):
        assert torch.equal(whole.view(4, 8)[index], group_advantages(values[index]))


def test_only_groups_whose_rewards_differ_are_informative():
    assert informative(torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    "bad", [torch.tensor(1.0), torch.zeros(4, 1), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])]
)
def test_a_group_of_one_and_rewards_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match=r"at least two|not finite"):
        group_advantages(bad)


def test_the_order_of_rollouts_does_not_matter():
    values = rewards(1, 8, seed=2)[0]
    order = list(range(8))
    random.Random(0).shuffle(order)
    torch.testing.assert_close(group_advantages(values[order]), group_advantages(values)[order])
