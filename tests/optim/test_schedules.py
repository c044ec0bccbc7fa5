"""Learning-rate schedules against tables computed by hand."""

import pytest

from nanochat_cli.config.schema import OptimConfig
from nanochat_cli.optim.schedules import lr_multiplier, muon_momentum, weight_decay_multiplier


def values(steps, total, **options):
    config = OptimConfig(**options)
    return [lr_multiplier(step, total, config) for step in steps]


def test_wsd_is_tabulated():
    """Warm-up over 4 steps, flat to step 10, then linear to 0.1 at step 20."""
    steps = [0, 1, 3, 4, 9, 10, 11, 15, 19, 20]
    expected = [0.25, 0.5, 1.0, 1.0, 1.0, 1.0, 0.91, 0.55, 0.19, 0.1]
    assert values(steps, 20, warmup_steps=4, stable_ratio=0.5, min_lr_ratio=0.1) == pytest.approx(expected)


def test_wsd_with_a_cosine_decay_is_tabulated():
    expected = [1.0, 0.85355339, 0.5, 0.14644661, 0.0]
    assert values([4, 5, 6, 7, 8], 8, warmup_steps=0, stable_ratio=0.5, decay_shape="cosine") == pytest.approx(expected)


def test_wsd_with_a_square_root_decay_is_tabulated():
    expected = [1.0, 0.5, 0.29289322, 0.13397460, 0.0]
    assert values([4, 5, 6, 7, 8], 8, warmup_steps=0, stable_ratio=0.5, decay_shape="sqrt") == pytest.approx(expected)


def test_two_stage_drops_at_one_half():
    expected = [1.0, 0.75, 0.51, 2 / 3 * 0.5, 2 / 3 * 0.25]
    assert values([0, 25, 49, 50, 75], 100, warmup_steps=0, schedule="two_stage") == pytest.approx(expected)


def test_cosine_is_tabulated():
    expected = [1.0, 0.85355339, 0.5, 0.14644661, 0.0]
    assert values([0, 2, 4, 6, 8], 8, warmup_steps=0, schedule="cosine") == pytest.approx(expected)


def test_constant_stays_at_the_peak_after_the_warm_up():
    assert values([0, 1, 2, 50, 99], 100, warmup_steps=2, schedule="constant") == [0.5, 1, 1, 1, 1]


@pytest.mark.parametrize("schedule", ["wsd", "two_stage", "cosine", "constant"])
def test_the_first_step_of_a_warm_up_is_not_at_the_peak(schedule):
    assert values([0], 100, warmup_steps=10, schedule=schedule) == [0.1]


def test_weight_decay_ends_after_two_thirds_of_a_two_stage_run():
    config = OptimConfig(schedule="two_stage")
    assert [weight_decay_multiplier(s, 99, config) for s in (0, 65, 66, 98)] == [1, 1, 0, 0]
    assert weight_decay_multiplier(98, 99, OptimConfig()) == 1


def test_momentum_of_muon_climbs_linearly_and_stays():
    config = OptimConfig(muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup=10)
    assert [muon_momentum(step, config) for step in (0, 1, 5, 10, 300)] == pytest.approx([0.85, 0.86, 0.9, 0.95, 0.95])
    assert muon_momentum(0, OptimConfig(muon_momentum=0.9)) == 0.9
