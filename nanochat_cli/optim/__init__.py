"""Optimizers and learning-rate schedules: Muon for the ternary latents, AdamW or Lion for the rest."""

from nanochat_cli.optim.build import Optimizers, build_optimizer
from nanochat_cli.optim.schedules import lr_multiplier

__all__ = ["Optimizers", "build_optimizer", "lr_multiplier"]
