"""Times of the parts of a step: they are logged on request, add up to less than the step, and change nothing."""

import time
from pathlib import Path

import pytest
import torch

from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.phases import PHASES, CPUPhases, CUDAPhases, Phases, make_phases
from nanochat_cli.training.trainer import Trainer
from tests.training.synthetic import SyntheticData, tiny_config

NAMES = [f"time/{phase}_ms" for phase in PHASES]


def train(folder: Path, *, phases: bool) -> list[dict[str, float]]:
    telemetry = {"interval": 50, "tensorboard": False, "phases": phases}
    config = tiny_config(folder, telemetry=telemetry, train={"log_interval": 3})
    Trainer(config, SyntheticData(8, 16), folder / "tiny", QuietReporter()).fit()
    return [record for record in read_metrics(folder / "tiny") if "loss/main" in record]


def test_every_logged_step_has_the_mean_times_of_the_steps_since_the_last_one(tmp_path):
    records = train(tmp_path, phases=True)
    assert len(records) == 4
    for record in records:
        assert all(record[name] > 0 for name in NAMES)
    # Means over all steps, so that the parts add up to no more than the whole.
    parts = sum(record[name] for record in records for name in NAMES) * 3 / 1e3
    assert parts <= records[-1]["seconds"]


def test_without_the_key_nothing_is_logged_and_the_losses_are_the_same(tmp_path):
    plain = train(tmp_path / "off", phases=False)
    assert not any(name in record for record in plain for name in NAMES)
    measured = train(tmp_path / "on", phases=True)
    assert [record["loss/main"] for record in plain] == [record["loss/main"] for record in measured]


def test_a_phase_counts_as_often_as_it_occurs_and_a_reading_resets_it(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 8.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    phases = CPUPhases()
    for _ in range(2):
        with phases("forward"):
            pass
        phases.end_step()
    assert phases.read() == {"time/forward_ms": 2000.0, "time/backward_ms": 0.0, "time/optimizer_ms": 0.0}
    assert phases.read() == {}
    with phases("backward"):
        pass
    phases.end_step()
    assert phases.read()["time/backward_ms"] == 500.0


def test_the_clock_is_that_of_the_device():
    assert type(make_phases(False, torch.device("cpu"))) is Phases
    assert isinstance(make_phases(True, torch.device("cpu")), CPUPhases)
    assert isinstance(make_phases(True, torch.device("cuda")), CUDAPhases)


class _Event:
    """Replaces a CUDA event: its time is the number of events recorded before it."""

    recorded = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = _Event.recorded
        _Event.recorded += 1

    def elapsed_time(self, end: "_Event") -> float:
        return float(end.at - self.at)


def test_events_of_the_last_step_are_read_with_those_after_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    phases = CUDAPhases()
    assert phases.read() == {}
    for micro_batches in (1, 2, 4):
        for _ in range(micro_batches):
            with phases("forward"):
                pass
        phases.end_step()
    # One event apart each: of the first two steps 3 forward passes; the third may still be running.
    assert phases.read()["time/forward_ms"] == 1.5
    assert phases.read() == {}
    phases.end_step()
    assert phases.read()["time/forward_ms"] == 4.0
