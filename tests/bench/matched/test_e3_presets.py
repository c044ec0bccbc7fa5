"""The configurations of the E3 suite are the published ones, and the isolated ones have one method each.

The oracle is the table below, written by hand from what was published: which methods a configuration has, and with
which numbers. `best` is our own.
"""

from itertools import combinations

import pytest

from nanochat_cli.bench.matched.plan import ABLATIONS, CONFIGS
from nanochat_cli.bench.matched.report.configs import Settings, settings_of
from nanochat_cli.config.load import resolve_config

MTP = {"mtp.enabled": True, "mtp.kind": "heads", "mtp.n_tokens": 3, "mtp.weight": 0.2}
COLLIDER = {"collider.enabled": True, "collider.threshold": 0.3, "collider.sparsity": 0.35}
ASYNC = {"loader.enabled": True, "loader.workers": 6, "loader.prefetch": 12}
EIGHT_BIT = {"optim.eight_bit": True, "optim.eight_bit_other": True}
GALORE = {"optim.galore.enabled": True, "optim.galore.rank": 256, "optim.galore.update_freq": 200}
OFF = {"mtp.enabled", "collider.enabled", "loader.enabled", "optim.eight_bit", "optim.galore.enabled"}

PUBLISHED: dict[str, dict[str, object]] = {
    "baseline": {},
    "mtp-only": MTP,
    "muon-8bit": MTP | COLLIDER | ASYNC | EIGHT_BIT,
    "galore2": MTP | COLLIDER | ASYNC | GALORE,
    "full": MTP | COLLIDER | ASYNC | EIGHT_BIT | GALORE,
}
FASTEST = {"train.backward": "auto", "train.attention": "auto", "optim.muon_format": "auto"}
BEST: dict[str, dict[str, object]] = {"best": FASTEST | GALORE}
ISOLATED: dict[str, dict[str, object]] = {
    "collider-only": COLLIDER,
    "async-only": ASYNC,
    "8bit-only": EIGHT_BIT,
    "galore-only": GALORE,
}
METHODS = {**PUBLISHED, **BEST, **ISOLATED}
PAIRS = list(combinations(METHODS, 2))


def settings(name: str) -> Settings:
    return settings_of(resolve_config([f"e3/{name}"]))


def differing(one: str, other: str) -> set[str]:
    ours, theirs = settings(one), settings(other)
    return {key for key in ours if ours[key] != theirs[key]}


def test_the_table_names_every_configuration_of_the_suite():
    assert (*PUBLISHED, *BEST) == CONFIGS
    assert tuple(ISOLATED) == ABLATIONS


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_has_its_methods_with_the_published_numbers_and_no_other(name):
    found = settings(name)
    exact = {"train.backward": "exact", "train.attention": "torch", "optim.muon_format": None}
    expected = dict.fromkeys(OFF, False) | exact | METHODS[name]
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize("name", METHODS)
def test_matrices_are_trained_by_muon_and_the_rest_by_lion(name):
    found = settings(name)
    assert (found["optim.matrix"], found["optim.other"]) == ("muon", "lion")


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map(" and ".join, PAIRS))
def test_two_configurations_differ_in_the_keys_of_their_methods_and_in_no_other(one, other):
    sections = {key.split(".")[0] if "optim" not in key else key for key in {*METHODS[one]} ^ {*METHODS[other]}}
    found = differing(one, other)
    assert found, f"{one} and {other} are the same configuration"
    assert {key.split(".")[0] if "optim" not in key else key for key in found} <= sections, found


def test_muon_8bit_galore2_and_full_differ_only_in_the_optimizer():
    assert differing("muon-8bit", "galore2") == {"optim.eight_bit", "optim.galore.enabled"}
    assert differing("muon-8bit", "full") == {"optim.galore.enabled"}
    assert differing("galore2", "full") == {"optim.eight_bit"}
