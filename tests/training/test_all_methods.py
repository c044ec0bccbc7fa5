"""Every E3 method together: 60 steps, a resume that is exact, finite losses, and the telemetry of each."""

import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_cli.engine import Engine
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from tests.e2e.tiny import write_corpus
from tests.training.synthetic import tiny_config

STEPS = 60
EXPECTED = {
    "loss/mtp_1",
    "collider/kept_fraction",
    "collider/kept_loss",
    "throughput/busy_fraction",
    "fire/dfi_before",
    "fire/dfi_after",
    "ternary/flip_rate",
}


def train(folder: Path, name: str, steps: int, resume: Path | None = None) -> Path:
    config = tiny_config(
        folder / "runs",
        run={"name": name},
        model={"vocab_size": 300, "max_seq_len": 32, "mhc": {"streams": 2}},
        data={"source": str(folder / "text"), "glob": "*.py"},
        train={"total_steps": steps, "grad_accum": 2, "log_interval": 1, "compile": "off"},
        eval={"interval": 1000},
        optim={
            "schedule": "constant",
            "eight_bit": True,
            "galore": {"enabled": True, "rank": 16, "update_freq": 20},
        },
        mtp={"enabled": True, "n_tokens": 2},
        collider={"enabled": True, "sparsity": 0.4, "warmup_steps": 10},
        loader={"enabled": True, "workers": 2, "prefetch": 4},
        fire={"enabled": True, "steps": [40], "rewarm_steps": 10},
        telemetry={"interval": 20, "tensorboard": True},
    )
    return Engine(QuietReporter()).train(config, resume)


def test_all_methods_together_train_resume_exactly_and_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "cache"))
    write_corpus(tmp_path / "text")
    whole = train(tmp_path, "whole", STEPS)
    part = train(tmp_path, "part", 35)
    train(tmp_path, "part", STEPS, resume=part)
    for section in ("model", "optimizer", "mtp"):
        one, other = (flatten(checkpoints.load(run).tensors[section]) for run in (whole, part))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), section
    lines = read_metrics(whole)
    assert {name for line in lines for name in line} >= EXPECTED
    losses = [line["loss/main"] for line in lines if "loss/main" in line]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= EXPECTED


def flatten(tree: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested dictionaries of tensors as one, by path."""
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    found: dict[str, torch.Tensor] = {}
    if isinstance(tree, dict):
        for name, value in tree.items():
            found |= flatten(value, f"{prefix}/{name}")
    return found
