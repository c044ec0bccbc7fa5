"""The losses of multi-token prediction: each token further ahead is one more term of the objective.

The modules and what they predict are `model.mtp`; here they are trained and saved with the model.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nanochat_cli.model.mtp import MTP, shifted_targets
from nanochat_cli.model.transformer import use_forms
from nanochat_cli.training.part import MicroBatch, Part, Setup
from nanochat_cli.training.progress import Progress


class MTPLoss(Part):
    """Weighted cross-entropies of tokens ahead, over the tokens that count in the main loss."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        forward = setup.config.train.forward
        self.mtp = setup.beside["mtp"] = MTP(setup.model.config, setup.config.mtp).to(setup.device)
        use_forms(self.mtp.linears(), None if forward == "auto" else forward)
        self._weights: list[float] = []
        self._states: list[Tensor] = []

    def begin(self, progress: Progress) -> None:
        self._weights = self.mtp.weights(progress.step / progress.total_steps)

    def after_forward(self, micro: MicroBatch) -> None:
        with self.setup.score.autocast():
            self._states = self.mtp.hidden_states(self.setup.model, micro.hidden, micro.targets)

    def add_loss(self, micro: MicroBatch, objective: Tensor, counted: Tensor) -> Tensor:
        for i, (states, weight) in enumerate(zip(self._states, self._weights, strict=True)):
            term, cross_entropy = self.setup.score(states, shifted_targets(micro.targets, i + 1), micro.counted)
            objective = objective + weight * term
            micro.metrics[f"loss/mtp_{i + 1}"] = cross_entropy
        self._states = []
        return objective

    def after_step(self, progress: Progress, metrics: Mapping[str, float], *, taken: bool) -> None:
        if taken:
            self.mtp.requantize()

    def tensors(self) -> dict[str, Any]:
        return {"mtp": self.mtp.state_dict()}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self.mtp.load_state_dict(tensors["mtp"])
        self.mtp.requantize()
