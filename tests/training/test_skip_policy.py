"""Steps are skipped for what is wrong with them, and for nothing else."""

import json
import math
import random

import pytest

from nanochat_cli.errors import NanochatError
from nanochat_cli.training.skip_policy import SkipPolicy


def corrected_average(norms: list[float], decay: float) -> float:
    """The definition: weights decay^age, normalised to one."""
    weights = [decay ** (len(norms) - 1 - index) for index in range(len(norms))]
    return sum(weight * norm for weight, norm in zip(weights, norms, strict=True)) / sum(weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_or_norm_is_skipped_from_the_first_step_on(bad: float) -> None:
    policy = SkipPolicy(4.0, 10)
    assert policy.reason_to_skip(bad, 1.0) == f"the loss is {bad}"
    assert policy.reason_to_skip(1.0, bad) == f"the gradient norm is {bad}"
    assert (policy.skipped, policy.consecutive, policy.mean_norm) == (2, 2, None)


def test_the_running_mean_is_the_weighted_mean_of_accepted_norms_only() -> None:
    generator = random.Random(5)
    policy = SkipPolicy(3.0, 100, warmup_steps=10, decay=0.9)
    accepted: list[float] = []
    for step in range(200):
        norm = generator.lognormvariate(0, 0.2) * (10 if step > 20 and generator.random() < 0.2 else 1)
        expected_skip = step >= 10 and norm > 3.0 * corrected_average(accepted, 0.9)
        assert (policy.reason_to_skip(2.0, norm) is not None) == expected_skip
        if not expected_skip:
            accepted.append(norm)
        assert policy.mean_norm == pytest.approx(corrected_average(accepted, 0.9), rel=1e-12)
    assert policy.skipped == 200 - len(accepted) > 10


def test_spikes_are_taken_during_the_first_steps() -> None:
    policy = SkipPolicy(4.0, 10, warmup_steps=3)
    for norm in (1.0, 50.0, 1.0):
        assert policy.reason_to_skip(1.0, norm) is None
    # (0.98² · 1 + 0.98 · 50 + 1) / (0.98² + 0.98 + 1) = 17.3
    assert policy.reason_to_skip(1.0, 1000.0) == "the gradient norm 1e+03 is 57.7 × its running mean 17.3"


def test_too_many_in_a_row_stops_the_run_and_names_the_last_good_checkpoint() -> None:
    policy = SkipPolicy(4.0, 3)
    assert policy.reason_to_skip(math.nan, 1.0, "step 500")
    assert policy.reason_to_skip(math.nan, 1.0, "step 500")
    assert policy.reason_to_skip(1.0, 1.0, "step 500") is None
    assert policy.consecutive == 0
    assert policy.reason_to_skip(math.nan, 1.0, "step 500")
    assert policy.reason_to_skip(math.nan, 1.0, "step 500")
    with pytest.raises(NanochatError, match=r"3 steps in a row .* loss is nan; the last good checkpoint is step 500;"):
        policy.reason_to_skip(math.nan, 1.0, "step 500")
    assert policy.skipped == 5


def test_the_state_survives_json_and_decides_the_same() -> None:
    generator = random.Random(9)
    policy = SkipPolicy(2.0, 50)
    for _ in range(40):
        policy.reason_to_skip(1.0, generator.random())
    resumed = SkipPolicy(2.0, 50)
    resumed.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    norms = [generator.random() * 2 for _ in range(100)]
    assert [policy.reason_to_skip(1.0, norm) for norm in norms] == [resumed.reason_to_skip(1.0, norm) for norm in norms]
    assert policy.state_dict() == resumed.state_dict()


def test_a_norm_that_stays_high_is_a_new_level_and_not_divergence() -> None:
    policy = SkipPolicy(4.0, 20)
    reasons = [policy.reason_to_skip(2.0, norm) for norm in [1.0] * 30 + [5.0] * 200]
    assert [step for step, reason in enumerate(reasons) if reason] == [30, 31, 32]
    assert policy.mean_norm == pytest.approx(5.0)
    assert policy.reason_to_skip(2.0, 50.0), "at the new level a spike is one again"


def test_no_sequence_of_finite_norms_ends_a_run_or_skips_more_than_three_steps_in_a_row() -> None:
    generator = random.Random(3)
    for spread in (0.5, 2.0, 5.0):
        policy = SkipPolicy(2.0, 4)
        for step in range(500):
            policy.reason_to_skip(2.0, generator.lognormvariate(step / 20, spread))
            assert policy.consecutive <= 3


def test_only_steps_that_are_not_finite_count_towards_the_end() -> None:
    policy = SkipPolicy(4.0, 3)
    for _ in range(25):
        policy.reason_to_skip(1.0, 1.0)
    for norm in (9.0, 9.0, math.nan, math.inf):
        assert policy.reason_to_skip(1.0, norm)
    with pytest.raises(NanochatError, match=r"^training diverged: 3 steps in a row .* norm is nan; no good checkpoint"):
        policy.reason_to_skip(1.0, math.nan)


def test_the_state_of_an_older_checkpoint_is_read() -> None:
    policy = SkipPolicy(4.0, 3)
    policy.load_state_dict({"mean_sum": 0.5, "accepted": 40, "skipped": 3, "consecutive": 1})
    assert (policy.skipped, policy.consecutive) == (3, 1)
