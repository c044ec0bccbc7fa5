"""The steps that fit into a time budget, and their learning rates, with a made-up clock."""

import itertools

import pytest

from nanochat_cli.config.schema import OptimConfig
from nanochat_cli.optim.schedules import WarmUps, lr_multiplier, muon_momentum
from nanochat_cli.training.methods.fire import REWARM_SHARE, rewarm_factor
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.time_budget import TimeBudget


def simulate(step_seconds, budget, config, max_steps=10_000, progress=None, filtering=0):
    """A run by the clock, or of max_steps without a budget. Returns its progress and each step's factor on the rate."""
    clock = None if budget is None else TimeBudget(budget, config, max_steps)
    asked = WarmUps.configured(config, filtering)
    progress = progress or Progress(
        max_steps, total_is_final=clock is None, warm_ups=asked if clock else asked.within(max_steps)
    )
    rates = []
    while progress.step < progress.total_steps:
        rates.append(lr_multiplier(progress.step, progress.known_total, config, progress.warm_ups.rate))
        seconds = step_seconds(progress.step)
        progress.step += 1
        progress.seconds += seconds
        if clock is not None and not progress.total_is_final:
            clock.fit(progress, asked, seconds)
    return progress, rates


SCHEDULES = {
    "wsd": {},
    "wsd, late decay": {"stable_ratio": 0.9},
    "wsd, square root": {"decay_shape": "sqrt", "stable_ratio": 0.2},
    "wsd, floor": {"min_lr_ratio": 0.1},
    "two_stage": {"schedule": "two_stage"},
    "cosine": {"schedule": "cosine"},
    "constant": {"schedule": "constant"},
}
MACHINES = {
    "fast": lambda step: 0.2,
    "slow": lambda step: 3.75,
    "very slow": lambda step: 30.0,
    "fast, after compiling": lambda step: 25.0 if step == 0 else 0.2,
    "stalls in the warm-up": lambda step: 75.0 if step == 3 else 0.5,
    "stalls on the plateau": lambda step: 75.0 if step == 30 else 0.5,
    "stalls in the decay": lambda step: 75.0 if step == 80 else 0.5,
}
BOUNDS = [(None, 8), (None, 15), (None, 100), (60.0, 20_000), (60.0, 30), (20.0, 20_000)]


@pytest.mark.parametrize("bound", BOUNDS, ids=lambda bound: f"{bound[0]} s, {bound[1]} steps")
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_run_is_at_its_peak_within_a_third_and_ends_decayed(schedule, machine, bound):
    for warmup in (0, 20, 500):
        config = OptimConfig(warmup_steps=warmup, **SCHEDULES[schedule])
        progress, rates = simulate(MACHINES[machine], bound[0], config, bound[1])
        assert len(rates) == progress.step >= 8
        peak = rates.index(max(rates))
        assert max(rates) == 1.0
        assert peak <= len(rates) / 3, (peak, len(rates))
        assert rates[: peak + 1] == sorted(rates[: peak + 1]), "no rate falls in the warm-up"
        if schedule != "constant":
            # The minimum would be reached one step later, so the last rate is that of one remaining step of decay.
            one_step = {"wsd, late decay": 1 / (0.1 * len(rates)), "two_stage": 2 / 3 / len(rates)}
            left = max(one_step.get(schedule, 1 / (0.6 * len(rates))), 1e-9)
            assert rates[-1] <= config.min_lr_ratio + left + 1e-9


def test_the_slow_machine_of_the_report_ends_at_the_minimum():
    """60 s budget, 3.75 s a step: it ended at 0.8 of the peak, in its warm-up."""
    progress, rates = simulate(lambda _: 3.75, 60.0, OptimConfig(lr=0.04))
    assert progress.step == 16
    assert rates[3] == 1.0
    assert 0.04 * rates[-1] < 0.005


def test_a_process_that_is_stopped_longer_than_its_budget_still_decays():
    """20 s budget, stopped for 25 s on the plateau: it ended there at the peak rate. The stall is charged a quarter."""
    progress, rates = simulate(lambda step: 25.1 if step == 50 else 0.1, 20.0, OptimConfig())
    assert progress.step == pytest.approx(150, abs=1)
    assert progress.excess_seconds == pytest.approx(25.1 - 5.0)
    assert rates[-1] < 0.02


def test_a_machine_that_stalls_again_and_again_does_not_end_at_the_peak():
    progress, rates = simulate(lambda step: 75.0 if step % 40 == 20 else 0.5, 60.0, OptimConfig())
    assert rates[-1] < 0.1 < 0.8 < max(rates)
    assert progress.step < 120


def test_constant_steps_fill_the_budget_and_freeze_where_the_decay_begins():
    progress, rates = simulate(lambda _: 0.5, 100.0, OptimConfig(warmup_steps=10, stable_ratio=0.4))
    assert (progress.step, progress.seconds) == (200, 100.0)
    assert [rates[80], rates[140]] == [1.0, 0.5]
    assert max(step for step, rate in enumerate(rates) if rate == 1.0) == 80


def test_a_slow_first_step_is_paid_for_and_does_not_spoil_the_rate():
    progress, _ = simulate(lambda s: 20.0 if s == 0 else 0.5, 100.0, OptimConfig(warmup_steps=10))
    assert (progress.step, progress.seconds) == (161, 100.0)


def test_a_machine_that_slows_down_before_the_decay_still_ends_in_time():
    config = OptimConfig(warmup_steps=10, stable_ratio=0.5)
    assert simulate(lambda s: 0.5 if s < 30 else 1.0, 100.0, config)[0].seconds <= 101.0


def test_total_steps_is_an_upper_bound_and_eight_a_lower_one():
    assert simulate(lambda _: 0.01, 100.0, OptimConfig(), max_steps=50)[0].step == 50
    assert simulate(lambda _: 500.0, 100.0, OptimConfig())[0].step == 8
    assert simulate(lambda _: 500.0, 100.0, OptimConfig(schedule="constant"))[0].step == 8


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_is_resumed_and_compiles_again_ends_as_long_and_as_decayed(schedule):
    config = OptimConfig(**SCHEDULES[schedule])
    for stop in (3, 10, 30, 70):
        progress = Progress(20_000, total_is_final=False, warm_ups=WarmUps.configured(config))
        steps = itertools.count()
        clock = TimeBudget(60.0, config, 20_000)
        while progress.step < stop and next(steps) < stop:
            progress.step += 1
            progress.seconds += 0.5
            if not progress.total_is_final:
                clock.fit(progress, WarmUps.configured(config), 0.5)
        resumed, rates = simulate(lambda step, stop=stop: 5.0 if step == stop else 0.5, 60.0, config, 20_000, progress)
        assert 110 <= resumed.step <= 120
        assert schedule == "constant" or rates[-1] <= config.min_lr_ratio + 0.1


def test_the_warm_ups_of_momentum_and_of_filtering_take_a_third_at_most():
    config = OptimConfig(muon_momentum_start=0.5, muon_momentum=0.9, muon_momentum_warmup=300)
    for bound, total in (((None, 30), 30), ((60.0, 20_000), 16)):
        progress, _ = simulate(lambda _: 3.75, bound[0], config, bound[1], filtering=100)
        assert progress.step == total
        assert progress.warm_ups.filtering == progress.warm_ups.momentum == total // 3
        assert muon_momentum(total // 3, config, progress.warm_ups.momentum) == 0.9
    assert WarmUps.configured(config, 7).within(10_000) == WarmUps(20, 300, 7)


def test_the_rate_climbs_again_after_a_reinitialisation_within_what_is_left():
    factors = [rewarm_factor(step, 52, int(REWARM_SHARE * (60 - 52))) for step in range(52, 60)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
