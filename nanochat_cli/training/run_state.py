"""The tensors that a run's next step depends on: into a checkpoint, and back out of one.

Knows the objects that hold them; the plain values beside them are the trainer's and `training.resume`'s affair.
"""

from typing import Any

import torch

from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.mtp import MTP
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim.build import Optimizers
from nanochat_cli.training.telemetry import TernaryTelemetry


def tensors_of(
    model: Transformer, mtp: MTP | None, optimizers: Optimizers, telemetry: TernaryTelemetry
) -> dict[str, Any]:
    """By the parts of a checkpoint."""
    tensors = {
        "model": model.state_dict(),
        "optimizer": optimizers.state_dict(),
        "telemetry": telemetry.state_dict(),
        "random": checkpoints.rng_state(),
    }
    if mtp is not None:
        tensors["mtp"] = mtp.state_dict()
    if mixtures := dict(model.mixtures()):
        tensors["expert_load"] = {name: {"load": m.load, "dropped": m.dropped} for name, m in mixtures.items()}
    return tensors


def restore_tensors(
    saved: dict[str, Any],
    model: Transformer,
    mtp: MTP | None,
    optimizers: Optimizers,
    telemetry: TernaryTelemetry,
    device: torch.device,
) -> None:
    """Put back what `tensors_of` returned, of a run that may be resumed so (see `training.resume`)."""
    model.load_state_dict(saved["model"])
    model.requantize()
    if mtp is not None:
        mtp.load_state_dict(saved["mtp"])
        mtp.requantize()
    for name, moe in model.mixtures():
        moe.load.copy_(saved["expert_load"][name]["load"])
        moe.dropped.copy_(saved["expert_load"][name]["dropped"])
    optimizers.load_state_dict(saved["optimizer"])
    telemetry.load_state_dict(saved["telemetry"], device)
    checkpoints.restore_rng_state(saved["random"])
