"""A report says when its runs took place on different machines or commits, or with uncommitted code."""

from dataclasses import replace

from nanochat_cli.bench.matched.report.notes import environment_notes
from tests.bench.matched.report.suites import record, suite

HERE = {"git": {"commit": "a" * 40, "dirty": False}, "device": "CPU A", "cores": 2, "versions": {"torch": "2.13.0"}}


def made(*environments: dict):
    return suite([replace(record("baseline", seed), environment=found) for seed, found in enumerate(environments)])


def test_runs_of_one_commit_and_machine_need_no_note():
    assert environment_notes(made(HERE, HERE | {"date": "later"})) == []
    assert environment_notes(made({}, HERE)) == []


def test_another_machine_commit_or_torch_is_named_with_its_runs():
    other = HERE | {"device": "CPU B", "versions": {"torch": "2.9.0"}, "git": {"commit": "b" * 40, "dirty": False}}
    assert environment_notes(made(HERE, other, HERE)) == [
        "The runs differ in commit: aaaaaaaaaaaa (baseline-0, baseline-2); bbbbbbbbbbbb (baseline-1).",
        "The runs differ in machine: CPU A (baseline-0, baseline-2); CPU B (baseline-1).",
        "The runs differ in torch: 2.13.0 (baseline-0, baseline-2); 2.9.0 (baseline-1).",
    ]


def test_uncommitted_changes_are_noted():
    dirty = HERE | {"git": {"commit": "a" * 40, "dirty": True}}
    assert environment_notes(made(*[dirty] * 6)) == [
        "Measured with uncommitted changes: baseline-0, baseline-1, baseline-2, baseline-3 and 2 more."
    ]
