"""Tuning: the same factors and steps for every contender, on a seed that is not compared; the best rate is chosen."""

from dataclasses import replace

import pytest

from nanochat_cli.bench.matched.plan import Entry, entries, load_plan, resolve, save_plan, stands_for, tuning_entries
from nanochat_cli.bench.matched.tuning import Tuning, choose, load_tuned, save_tuned, tuning_notes
from nanochat_cli.errors import DataError
from tests.bench.matched.test_plan import e3

GRID = Tuning((2.0, 0.5, 1.0), 0.5)


def test_every_contender_tries_the_same_factors_of_its_own_rate_over_as_many_steps(tmp_path):
    plan = e3(configs=["full", "galore2"], tuning=GRID)
    found: dict[str, list[tuple[float, int]]] = {}
    for entry in tuning_entries(plan):
        config = resolve(plan, entry, tmp_path)
        own = resolve(plan, Entry(entry.contender, 0), tmp_path)
        assert config.train.total_steps == own.train.total_steps // 2
        found.setdefault(entry.contender.name, []).append((config.optim.lr / own.optim.lr, config.train.total_steps))
    assert list(found) == ["baseline", "full", "galore2"]
    assert {tuple(tried) for tried in found.values()} == {((0.5, 6), (1.0, 6), (2.0, 6))}


def test_no_compared_run_has_the_seed_of_tuning(tmp_path):
    plan = e3(seeds=9, tuning=GRID)
    tuned = {resolve(plan, entry, tmp_path).run.seed for entry in tuning_entries(plan)}
    assert len(tuned) == 1
    assert tuned.isdisjoint({resolve(plan, entry, tmp_path).run.seed for entry in entries(plan)})


def test_a_contender_that_trains_as_another_is_not_tuned_again():
    plan = e3(configs=["async-only", "8bit-only"], tuning=GRID)
    sources = {contender.name: stands_for(plan, contender).name for contender in plan.contenders}
    assert sources == {
        "baseline": "baseline",
        "async-only": "baseline",
        "8bit-only": "8bit-only",
        "baseline-again": "baseline",
    }


def test_a_tuning_run_is_a_miniature_whose_periods_shrink_with_it(tmp_path):
    plan = e3("cpu", configs=["full"], tuning=GRID)
    own = resolve(plan, Entry(plan.contenders[1], 0), tmp_path)
    config = resolve(plan, Entry(plan.contenders[1], 0, 0.04), tmp_path)
    assert 2 * config.optim.galore.update_freq == own.optim.galore.update_freq
    assert 2 * config.optim.warmup_steps == own.optim.warmup_steps
    assert config.run.name == "full-lr0.04"


def test_without_tuning_there_are_no_tuning_runs_and_rates_stay(tmp_path):
    plan = e3(configs=["full"])
    assert tuning_entries(plan) == []
    assert {resolve(plan, entry, tmp_path).optim.lr for entry in entries(plan)} == {0.02}
    assert "not tuned" in tuning_notes(None)[0]


def test_the_rate_with_the_fewest_bits_is_chosen_among_runs_with_a_figure():
    tuned = choose(
        {"a": {0.01: 2.5, 0.02: 2.25, 0.04: None}, "b": {0.01: 3.0, 0.02: float("nan"), 0.04: 2.0}, "c": {0.01: None}},
        seed=1000,
        steps=40,
    )
    assert tuned.chosen == {"a": 0.02, "b": 0.04}
    assert "end of what was tried" in tuning_notes(tuned)[0]
    assert tuning_notes(tuned)[0].endswith(": b.")
    assert tuning_notes(replace(tuned, chosen={"a": 0.02})) == []


def test_a_chosen_rate_is_that_of_every_compared_run(tmp_path):
    plan = e3(configs=["full"], seeds=2, tuning=GRID)
    assert {resolve(plan, entry, tmp_path, rate=0.08).optim.lr for entry in entries(plan)} == {0.08}


def test_a_saved_tuning_is_loaded_unchanged(tmp_path):
    tuned = choose({"a": {0.01: 2.5, 0.02: None}}, seed=1000, steps=40)
    assert load_tuned(tmp_path) is None
    save_tuned(tmp_path, tuned)
    assert load_tuned(tmp_path) == tuned
    plan = e3(tuning=GRID)
    save_plan(plan, tmp_path)
    assert load_plan(tmp_path) == plan
    (tmp_path / "tuning.json").write_text("[1]")
    with pytest.raises(DataError, match=r"tuning\.json: not a record of tuning"):
        load_tuned(tmp_path)
