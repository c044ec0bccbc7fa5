"""The losses of multi-token prediction: each token further ahead is one more term of the objective.

The modules and what they predict are `model.mtp`; here they are trained and saved with the model.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.model.mtp import MTP, shifted_targets
from nanochat_cli.training.part import MicroBatch, Part, Setup
from nanochat_cli.training.progress import Progress


class MTPLoss(Part):
    """Weighted cross-entropies of tokens ahead, over the tokens that count in the main loss."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mtp = setup.beside["mtp"] = MTP(setup.model.config, setup.config.mtp).to(setup.device)
        self._weights: list[float] = []
        self._states: list[Tensor] = []
        self._step, self._over = 0, False
        """_over: its weight has faded."""

    def begin(self, progress: Progress) -> None:
        self._weights = self.mtp.weights(progress.step / progress.total_steps)
        self._step, self._over = progress.step, self.mtp.config.fade is not None and not any(self._weights)

    def after_forward(self, micro: MicroBatch) -> None:
        if self._over:
            return
        with self.setup.score.autocast():
            self._states = self.mtp.hidden_states(self.setup.model, micro.hidden, micro.targets)

    def add_loss(self, micro: MicroBatch, objective: Tensor, counted: Tensor) -> Tensor:
        if self._over:
            return objective
        rows, every = micro.counted, self.mtp.config.every
        if every > 1:
            rows = torch.arange(micro.targets.numel(), device=objective.device) if rows is None else rows
            rows = rows[self._step % every :: every]
        for i, (states, weight) in enumerate(zip(self._states, self._weights, strict=True)):
            term, cross_entropy = self.setup.score(states, shifted_targets(micro.targets, i + 1), rows)
            objective = objective + weight * term
            micro.metrics[f"loss/mtp_{i + 1}"] = cross_entropy
        self._states = []
        return objective

    def end(self, *, failed: bool) -> None:
        """Modules whose losses have no weight get a gradient of zero: a stack of Muon needs one of all its members."""
        if self._over and not failed:
            for parameter in self.mtp.parameters():
                parameter.grad = torch.zeros_like(parameter)

    def after_step(self, progress: Progress, metrics: Mapping[str, float], *, taken: bool) -> None:
        if taken:
            self.mtp.requantize()

    def tensors(self) -> dict[str, Any]:
        return {"mtp": self.mtp.state_dict()}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self.mtp.load_state_dict(tensors["mtp"])
        self.mtp.requantize()
