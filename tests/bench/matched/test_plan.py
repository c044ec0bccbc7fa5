"""A plan: which runs, in which order, and what they have in common."""

from pathlib import Path

import pytest

from nanochat_cli.bench.matched.plan import (
    ABLATIONS,
    CONFIGS,
    MORE_STEPS,
    Entry,
    Match,
    Plan,
    entries,
    load_plan,
    natural_match,
    plan_ab,
    plan_e3,
    resolve,
    save_plan,
)
from nanochat_cli.bench.matched.profiles import load_profile, load_profiles
from nanochat_cli.config.load import resolve_config
from nanochat_cli.errors import ConfigError, DataError


def e3(profile: str = "smoke", **changes) -> Plan:
    chosen = load_profile(profile)
    values = {"configs": None, "ablations": False, "seeds": 1, "match": "steps", "given": ()} | changes
    return plan_e3(profile=profile, profile_overrides=chosen.overrides, **values)


def ab(*vary: str, match: Match = "steps", base: str = "test-mtp", given: tuple[str, ...] = ()) -> Plan:
    return plan_ab(base=[base], vary=vary, overrides=(), seeds=1, match=match, given=given)


def test_configurations_of_one_seed_follow_each_other_and_every_other_seed_is_reversed():
    order = [(entry.contender.name, entry.seed) for entry in entries(e3(configs=["full"], seeds=3))]
    names = ["baseline", "full", "baseline-again"]
    assert order == [*((n, 0) for n in names), *((n, 1) for n in names[::-1]), *((n, 2) for n in names)]


def test_with_matched_time_the_baseline_of_a_seed_comes_first():
    order = entries(e3(configs=["full", "galore2"], seeds=2, match="time"))
    assert [entry.contender.name for entry in order if entry.seed == 1] == [
        *("baseline", "baseline-again", "galore2", "full")
    ]


def test_ablations_are_added_and_the_baseline_always_runs_twice():
    assert [c.name for c in e3(ablations=True).contenders] == [*CONFIGS, *ABLATIONS, "baseline-again"]
    assert [c.name for c in e3(configs=["full"]).contenders] == ["baseline", "full", "baseline-again"]
    with pytest.raises(ConfigError, match="--configs fast: no such configuration; choose from baseline"):
        e3(configs=["fast"])


@pytest.mark.parametrize("profile", load_profiles())
def test_a_profile_changes_sizes_and_no_method(profile, tmp_path):
    # What a preset has beyond the baseline's is the same methods with and without the profile.
    methods = ("mtp.enabled", "mtp.n_tokens", "mtp.weight", "collider.enabled", "collider.sparsity", "loader.enabled")
    methods += ("optim.eight_bit", "optim.eight_bit_other", "optim.galore.enabled", "optim.other", "model.qk_norm")
    rates = set()
    for contender in e3(profile, ablations=True).contenders:
        plain = resolve_config(contender.presets)
        shrunk = resolve(e3(profile, ablations=True), Entry(contender, 0), tmp_path)
        for key in methods:
            section, _, name = key.rpartition(".")
            assert _get(plain, section, name) == _get(shrunk, section, name), (contender.name, key)
        assert shrunk.telemetry.phases
        rates.add((shrunk.optim.lr, shrunk.optim.lion_lr_mult))
    assert len(rates) == 1, "a profile suits no contender more than another"


def _get(config, section: str, name: str):
    for part in section.split("."):
        config = getattr(config, part)
    return getattr(config, name)


def test_runs_of_a_seed_share_data_order_and_lie_in_the_suite(tmp_path):
    plan = e3(configs=["full"], seeds=2, given=("train.batch_size=4",))
    found = [resolve(plan, entry, tmp_path) for entry in entries(plan)]
    assert [config.run.seed for config in found] == [1337] * 3 + [1338] * 3
    assert {config.run.dir for config in found} == {tmp_path / "runs"}
    assert [config.run.name for config in found][:2] == ["baseline-seed0", "full-seed0"]
    assert {config.train.batch_size for config in found} == {4}


def test_matched_steps_and_tokens_differ_when_the_batch_does(tmp_path):
    plan = ab("train.batch_size=3", given=("train.total_steps=10", "train.batch_size=2"))
    contender = plan.contenders[1]
    assert resolve(plan, Entry(contender, 0), tmp_path).train.total_steps == 10
    plan = ab("train.batch_size=3", match="tokens", given=("train.total_steps=10", "train.batch_size=2"))
    assert resolve(plan, Entry(contender, 0), tmp_path).train.total_steps == 7  # 20 sequences, rounded up


def test_matched_time_is_a_budget_for_all_but_the_baseline(tmp_path):
    plan = ab("optim.lr=0.01", match="time", given=("train.total_steps=10",))
    base, contender = (resolve(plan, Entry(c, 0), tmp_path, 12.5).train for c in plan.contenders)
    assert (base.time_budget, base.total_steps) == (None, 10)
    assert (contender.time_budget, contender.total_steps) == (12.5, 10 * MORE_STEPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optim.lr=0.01", "optim.lr=0.01"), "--vary optim.lr=0.01 is given twice"),
        ((), "--vary is missing"),
        (("train.total_steps=3",), "--match makes the length of runs equal"),
        (("optim.lrr=1",), "did you mean optim.lr"),
        (("optim.lr=-1",), "optim.lr = -1"),
        (("nonsense",), "KEY=VALUE"),
        (("optim.lr=0.01 train.total_steps=3",), "--vary train.total_steps=3: --match makes"),
        (("optim.lr=0.01 lion_lr_mult=0.2",), r"--vary lion_lr_mult=0\.2 changes nothing"),
    ],
)
def test_a_plan_that_makes_no_sense_is_an_error_before_anything_runs(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ab(*arguments)


def test_a_variant_may_change_several_keys_at_once(tmp_path):
    text = "optim.muon_coefficients=cans optim.muon_ns_steps=3 optim.betas=[0.7, 0.9]"
    plan = ab(text)
    base, variant = (resolve(plan, Entry(c, 0), tmp_path).optim.model_dump() for c in plan.contenders)
    changed = {key: value for key, value in variant.items() if value != base[key]}
    assert changed == {"muon_coefficients": "cans", "muon_ns_steps": 3, "betas": (0.7, 0.9)}
    assert plan.contenders[1].name == text


def test_a_base_that_ends_by_the_clock_needs_a_matched_time():
    with pytest.raises(ConfigError, match=r"train\.time_budget = 300; take --match time"):
        ab("optim.lr=0.01", base="quickstart")


def test_a_saved_plan_is_loaded_unchanged(tmp_path: Path):
    plan = e3(seeds=2, given=("optim.lr=0.01",))
    save_plan(plan, tmp_path / "suite")
    assert load_plan(tmp_path / "suite") == plan
    with pytest.raises(DataError, match="not the folder of a suite"):
        load_plan(tmp_path)


def test_a_base_that_ends_by_the_clock_is_matched_by_time_unless_steps_are_given():
    assert natural_match(["quickstart"], ()) == "time"
    assert natural_match(["quickstart"], ("train.total_steps=100",)) == "steps"
    assert natural_match(["test-mtp"], ()) == "steps"


def test_varying_a_key_that_nothing_reads_is_refused():
    with pytest.raises(ConfigError, match=r'--vary lion_lr_mult=0\.2 changes nothing: it needs optim\.other = "lion"'):
        ab("lion_lr_mult=0.2")
    ab("lion_lr_mult=0.2", given=("optim.other=lion",))
