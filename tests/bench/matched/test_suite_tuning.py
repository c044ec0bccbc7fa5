"""A suite that tunes: rates first, then every run at its contender's best rate, even after a crash in between.

The runs are made up: each writes the held-out figure that a formula gives for its learning rate. That is the oracle.
"""

import json
import math
from pathlib import Path

import pytest

from nanochat_cli.bench.matched import suite as suites
from nanochat_cli.bench.matched.measures import RunOutcome
from nanochat_cli.bench.matched.plan import Plan, plan_e3, save_plan
from nanochat_cli.bench.matched.profiles import load_profile
from nanochat_cli.bench.matched.run_record import Suite
from nanochat_cli.bench.matched.suite_runs import Place
from nanochat_cli.bench.matched.tuning import Tuning
from nanochat_cli.config.schema import Config
from nanochat_cli.report.metrics_log import FILE_NAME
from nanochat_cli.report.reporter import QuietReporter

BEST = {False: 0.02, True: 0.04}
"""The best rate without and with GaLore."""


class Runs:
    """Replaces processes. fails_at: the number of the call that raises."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.done: list[Config] = []
        self.fails_at = fails_at

    def __call__(self, place: Place, config: Config, update: object, stop_requested: object) -> RunOutcome:
        if len(self.done) == self.fails_at:
            raise RuntimeError("the machine was turned off")
        self.done.append(config)
        bits = 2 + abs(math.log2(config.optim.lr / BEST[config.optim.galore.enabled]))
        step = {"step": 1, "tokens": 10, "seconds": 1.0, "loss/main": 2.0, "training/skipped": 0}
        end = {"step": 2, "tokens": 20, "seconds": 2.0, "final/bits_per_byte": bits, "final/loss": bits}
        folder = config.run.dir / str(config.run.name)
        folder.mkdir(parents=True)
        (folder / FILE_NAME).write_text("".join(json.dumps(line) + "\n" for line in (step, end)))
        place.record(RunOutcome("finished"))
        return RunOutcome("finished")


def plan() -> Plan:
    profile = load_profile("smoke")
    return plan_e3(
        profile="smoke",
        profile_overrides=profile.overrides,
        configs=["galore-only"],
        ablations=False,
        seeds=2,
        match="steps",
        given=(),
        tuning=Tuning((0.5, 1.0, 2.0), 0.5),
    )


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> Suite:
    monkeypatch.setattr(suites, "run_in_process", runs)
    return suites.resume_suite(folder, QuietReporter(), folder / "copied")


def test_a_suite_compares_each_at_its_best_rate_and_reports_what_was_tried(tmp_path, monkeypatch):
    save_plan(plan(), tmp_path)
    runs = Runs()
    found = run(tmp_path, monkeypatch, runs)
    assert [config.optim.lr for config in runs.done[:6]] == [0.01, 0.02, 0.04] * 2
    assert {config.optim.lr for config in runs.done[6:] if config.optim.galore.enabled} == {0.04}
    assert {config.optim.lr for config in runs.done[6:] if not config.optim.galore.enabled} == {0.02}
    assert {record.measures["bits_per_byte"] for record in found.runs} == {2.0}
    assert found.settings["tuning"]["chosen"] == {"baseline": 0.02, "galore-only": 0.04, "baseline-again": 0.02}
    assert any("at the end of what was tried" in note and "galore-only" in note for note in found.settings["notes"])
    values = {(result.case, result.metric): result.value for result in found.results}
    assert values["galore-only", "chosen optim.lr"] == 0.04
    assert values["baseline", "bits per byte after 6 steps, optim.lr 0.01"] == 3.0
    assert (tmp_path / "copied" / "report.json").read_bytes() == (tmp_path / "report.json").read_bytes()
    report = (tmp_path / "copied" / "REPORT.md").read_text()
    assert "| galore-only | 0.04 | 0.01: 4.0000 | 0.02: 3.0000 | 0.04: 2.0000 |" in report


@pytest.mark.parametrize("fails_at", [2, 8])
def test_a_suite_that_dies_while_tuning_or_later_is_resumed_where_it_was(tmp_path, monkeypatch, fails_at):
    save_plan(plan(), tmp_path)
    first, second = Runs(fails_at), Runs()
    with pytest.raises(RuntimeError, match="turned off"):
        run(tmp_path, monkeypatch, first)
    found = run(tmp_path, monkeypatch, second)
    names = [str(config.run.name) for config in (*first.done, *second.done)]
    assert len(set(names)) == len(names) == 6 + 3 * 2
    assert {record.measures["bits_per_byte"] for record in found.runs} == {2.0}
