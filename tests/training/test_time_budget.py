"""Steps that fit a time budget, with a made-up clock."""

from nanochat_cli.config.schema import OptimConfig
from nanochat_cli.training.time_budget import TimeBudget


def run(step_seconds, budget, config, max_steps=10_000):
    """Simulate: returns (steps taken, seconds used, step at which the total froze)."""
    clock = TimeBudget(budget, config, max_steps)
    step, elapsed, total, frozen = 0, 0.0, max_steps, None
    while step < total:
        seconds = step_seconds(step)
        step += 1
        elapsed += seconds
        if frozen is None:
            total = clock.total_steps(step, elapsed, seconds)
            if clock.must_freeze(step, total):
                frozen = step
    return step, elapsed, frozen


def test_constant_steps_fill_the_budget_and_freeze_where_the_decay_begins():
    steps, elapsed, frozen = run(lambda _: 0.5, 100.0, OptimConfig(warmup_steps=10, stable_ratio=0.4))
    assert steps == 200
    assert elapsed == 100.0
    assert frozen == 80


def test_a_slow_first_step_is_paid_for_and_does_not_spoil_the_rate():
    steps, elapsed, _ = run(lambda s: 20.0 if s == 0 else 0.5, 100.0, OptimConfig(warmup_steps=10))
    assert steps == 161
    assert elapsed == 100.0


def test_a_machine_that_slows_down_before_the_decay_still_ends_in_time():
    _, elapsed, _ = run(lambda s: 0.5 if s < 30 else 1.0, 100.0, OptimConfig(warmup_steps=10, stable_ratio=0.5))
    assert elapsed <= 101.0


def test_schedules_that_depend_on_the_total_from_the_start_freeze_after_a_short_calibration():
    _, _, frozen = run(lambda _: 0.5, 100.0, OptimConfig(warmup_steps=3, schedule="cosine"))
    assert frozen == 8


def test_total_steps_is_an_upper_bound_and_the_calibration_a_lower_one():
    assert run(lambda _: 0.01, 100.0, OptimConfig(), max_steps=50)[0] == 50
    assert run(lambda _: 500.0, 100.0, OptimConfig())[0] == 8
