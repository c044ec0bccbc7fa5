"""Sampling functions against their definitions, written as loops, and against the distributions they promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.inference.sampling import (
    SamplingConfig,
    draw,
    generators,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    sample,
)

rows_of_logits = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=12)


def kept(logits: torch.Tensor) -> set[int]:
    return {index for index, value in enumerate(logits[0].tolist()) if value > -math.inf}


@given(rows_of_logits, st.integers(1, 15))
def test_top_k_keeps_exactly_k_of_the_largest_values(values: list[float], k: int) -> None:
    logits = torch.tensor([values])
    result = kept(keep_top_k(logits, k))
    assert len(result) == min(k, len(values))
    assert sorted((values[i] for i in result), reverse=True) == sorted(values, reverse=True)[:k]


@given(rows_of_logits, st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_that_reaches_p(values: list[float], p: float) -> None:
    logits = torch.tensor([values])
    result = kept(keep_top_p(logits, p))
    probability = logits.double().softmax(-1)[0].tolist()
    chosen = sorted((probability[i] for i in result), reverse=True)
    assert result
    assert math.isclose(sum(chosen), sum(sorted(probability, reverse=True)[: len(result)]))
    assert sum(chosen) >= p - 1e-9
    assert sum(chosen[:-1]) < p + 1e-9


def test_filters_that_are_off_change_nothing() -> None:
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_top_k(logits, 0), logits)
    assert torch.equal(keep_top_k(logits, 9), logits)
    assert torch.equal(keep_top_p(logits, 1.0), logits)


def test_repetition_penalty_makes_seen_tokens_less_probable_on_both_sides_of_zero() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0]])
    seen = torch.tensor([[True, True, False, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]


@settings(max_examples=30)
@given(rows_of_logits, st.integers(0, 2**32))
def test_temperature_zero_is_the_argmax_and_draws_no_random_number(values: list[float], seed: int) -> None:
    logits = torch.tensor([values])
    rows = generators(seed, 1)
    before = rows[0].get_state()
    chosen = sample(logits, SamplingConfig(temperature=0), torch.zeros_like(logits, dtype=torch.bool), rows)
    assert values[int(chosen)] == max(values)
    assert torch.equal(rows[0].get_state(), before)


def test_draws_follow_the_probabilities_and_never_hit_an_impossible_token() -> None:
    probability = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]], dtype=torch.float64)
    rows = generators(7, 1)
    counts = torch.zeros(6)
    n = 20_000
    for _ in range(n):
        counts[int(draw(probability, rows))] += 1
    assert counts[[0, 2, 5]].sum() == 0
    # Five standard deviations of a binomial count.
    for index, p in enumerate(probability[0].tolist()):
        assert abs(counts[index] / n - p) <= 5 * math.sqrt(p * (1 - p) / n)


def test_low_temperature_approaches_greedy_and_high_temperature_uniform() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    seen = torch.zeros_like(logits, dtype=torch.bool)
    rows = generators(1, 1)
    cold = [int(sample(logits, SamplingConfig(temperature=0.01), seen, rows)) for _ in range(200)]
    hot = [int(sample(logits, SamplingConfig(temperature=1e4), seen, rows)) for _ in range(4000)]
    assert set(cold) == {3}
    assert all(abs(hot.count(i) / 4000 - 0.25) < 0.04 for i in range(4))


def test_row_i_of_a_batch_draws_like_a_single_row_with_seed_plus_i() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    seen = torch.zeros_like(logits, dtype=torch.bool)
    config = SamplingConfig(temperature=1.0, top_k=20, top_p=0.9)
    batch = sample(logits, config, seen, generators(11, 3)).tolist()
    single = [int(sample(logits[i : i + 1], config, seen[:1], generators(11 + i, 1))) for i in range(3)]
    assert batch == single


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"temperature": 1e-39},
        {"temperature": 1e300},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"repetition_penalty": 1e40},
        {"max_tokens": -1},
        {"seed": -1},
        {"stop": ("",)},
    ],
)
def test_a_setting_out_of_range_is_one_clear_line(bad: dict) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(bad))} = .* out of range") as error:
        SamplingConfig(**bad)
    assert "\n" not in str(error.value)


EXTREMES = [
    {"temperature": temperature, "repetition_penalty": penalty}
    for temperature in (0.0, 1e-6, 1.0, 999_999.0)
    for penalty in (1e-3, 1.0, 1e3)
]


@pytest.mark.parametrize("allowed", EXTREMES)
def test_every_allowed_setting_chooses_an_existing_token(allowed: dict) -> None:
    largest = torch.finfo(torch.float32).max
    logits = torch.tensor([[largest, -largest, 0.0, 1e-40], [50.0, 49.0, -1e30, 0.0]])
    seen = torch.tensor([[True, False, True, False], [False, True, True, False]])
    chosen = sample(logits, SamplingConfig(**allowed), seen, generators(0, 2))
    assert all(0 <= token < 4 for token in chosen.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_one_clear_line(temperature: float, bad: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [0.0, bad]])
    settings_ = SamplingConfig(temperature=temperature)
    with pytest.raises(DataError, match="logits are not finite: its weights are damaged"):
        sample(logits, settings_, torch.zeros_like(logits, dtype=torch.bool), generators(0, 2))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unused_ids_are_never_chosen_and_do_not_shift_the_others(temperature: float) -> None:
    """Whatever their logits; the others are drawn as if the unused ones did not exist."""
    logits = torch.tensor([[9.0, 1.0, 9.0, 2.0, 0.5]])
    unused, config = torch.tensor([0, 2]), SamplingConfig(temperature=temperature)
    for seed in range(200):
        seen = torch.zeros_like(logits, dtype=torch.bool)
        found = int(sample(logits, config, seen, generators(seed, 1), unused))
        alone = int(sample(logits[:, [1, 3, 4]], config, seen[:, [1, 3, 4]], generators(seed, 1)))
        assert found == (1, 3, 4)[alone]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.3, 1.0])
def test_min_p_keeps_tokens_with_at_least_that_share_of_the_best_probability(p):
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(3)) * 2
    possible = keep_min_p(logits, p).isfinite()
    probabilities = logits.double().softmax(-1)
    assert torch.equal(possible, probabilities >= p * probabilities.amax(-1, keepdim=True) * (1 - 1e-6))
    seen = torch.zeros(5, 40, dtype=torch.bool)
    drawn = sample(logits, SamplingConfig(temperature=1, min_p=p), seen, generators(1, 5))
    assert possible.gather(1, drawn[:, None]).all()
