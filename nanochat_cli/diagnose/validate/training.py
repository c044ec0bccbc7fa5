"""Stages `train` and `resume`: a tiny model learns, and an interrupted run ends exactly like an uninterrupted one."""

import math
from pathlib import Path
from typing import Any

import torch

from nanochat_cli.diagnose.validate.stage import Figure, Value, Workspace
from nanochat_cli.diagnose.validate.tiny_run import train_run
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.formats.run.state_tree import encode
from nanochat_cli.report.metrics_log import read_metrics

STEPS, STOP_AFTER = 20, 10
LAST = 4
"""The final training loss is the mean of so many steps."""
MARGIN = 2.0
"""Nats per token by which the loss must fall; a model that learns nothing stays at log(vocabulary) = 6.2."""
TIMINGS = ("seconds", "throughput/")


def train(workspace: Workspace) -> Figure:
    """The training loss falls by MARGIN, and so does the held-out loss."""
    run = train_run(workspace, workspace.run.name, STEPS)
    losses = finite_losses(run, STEPS)
    first, last = losses[0], sum(losses[-LAST:]) / LAST
    final = next(line for line in reversed(read_metrics(run)) if "final/loss" in line)
    held_out, bits = float(final["final/loss"]), float(final["final/bits_per_byte"])
    for what, loss in (("training", last), ("held-out", held_out)):
        if not loss <= first - MARGIN:
            raise ValidationFailure(
                f"the {what} loss went from {first:.3f} to {loss:.3f} nats per token in {STEPS} steps: "
                f"it must fall by {MARGIN:g}"
            )
    return Figure(
        f"loss {first:.2f} → {last:.2f} nats per token in {STEPS} steps; held-out {held_out:.2f}",
        [
            Value("training loss, first step", first, "nats per token"),
            Value(f"training loss, mean of the last {LAST} steps", last, "nats per token"),
            Value("held-out loss", held_out, "nats per token"),
            Value("held-out bits per byte", bits, "bits per byte"),
        ],
    )


def resume(workspace: Workspace) -> Figure:
    """The same run in two parts ends with equal weights, optimizer, random state and metrics."""
    part = train_run(workspace, "part", STOP_AFTER)
    train_run(workspace, "part", STEPS, resume=part)
    whole, resumed = (state_of(run) for run in (workspace.run, part))
    for section in whole.keys() | resumed.keys():
        _require_equal_trees(section, whole.get(section), resumed.get(section))
    for one, other in zip(metrics_of(workspace.run), metrics_of(part), strict=True):
        if one != other:
            name = next(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
            raise ValidationFailure(
                f"after a resume, {name} of step {one['step']} is {other.get(name)} in metrics.jsonl instead of "
                f"{one.get(name)} without an interruption"
            )
    tensors = _tensors(whole)
    n_values = sum(tensor.numel() for tensor in tensors.values())
    return Figure(
        f"{STOP_AFTER} + {STEPS - STOP_AFTER} steps = {STEPS} steps: {len(tensors)} tensors, {n_values:,} values equal "
        "bit for bit",
        [Value("tensors equal", len(tensors), "tensors"), Value("values equal bit for bit", n_values, "values")],
    )


def finite_losses(run: Path, steps: int) -> list[float]:
    """The training loss of every step. Raises ValidationFailure if one is missing, not finite or skipped."""
    lines = [line for line in read_metrics(run) if "loss/main" in line]
    if len(lines) != steps:
        raise ValidationFailure(f"metrics.jsonl has the loss of {len(lines)} steps, but {steps} were trained")
    for line in lines:
        for name in ("loss/main", "loss/objective", "training/grad_norm"):
            if line[name] is None or not math.isfinite(line[name]):
                raise ValidationFailure(f"{name} of step {line['step']} is not finite")
    if skipped := lines[-1]["training/skipped"]:
        raise ValidationFailure(f"{skipped:g} of {steps} steps were skipped")
    return [float(line["loss/main"]) for line in lines]


def state_of(run: Path) -> dict[str, Any]:
    """Everything in the last checkpoint on which the next step depends."""
    return checkpoints.load(run).tensors


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without timings and without evaluations, which happen at the end of each part."""
    lines = [{key: value for key, value in line.items() if not key.startswith(TIMINGS)} for line in read_metrics(run)]
    return [line for line in lines if "loss/main" in line]


def _tensors(tree: object) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    encode(tree, (), tensors)
    return tensors


def _require_equal_trees(section: str, whole: object, resumed: object) -> None:
    one, other = _tensors(whole), _tensors(resumed)
    if odd := sorted(one.keys() ^ other.keys()):
        raise ValidationFailure(f"{section}: {odd[0]} is in only one of the resumed and the uninterrupted checkpoint")
    for name, tensor in one.items():
        if not torch.equal(tensor, other[name]):
            raise ValidationFailure(
                f"{section}: {name} differs between {STOP_AFTER} + {STEPS - STOP_AFTER} steps and {STEPS} steps"
            )
    if encode(whole, (), {}) != encode(resumed, (), {}):
        raise ValidationFailure(f"{section}: a value differs between the resumed and the uninterrupted checkpoint")
