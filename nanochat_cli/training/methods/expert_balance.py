"""The balance of a mixture's experts while it trains: its loss, its selection bias, and how evenly tokens are spread.

The mathematics of the balance is in `model.moe`, whose layers count the tokens that each expert gets. The counts are
read and reset here, and saved, so that a resumed run logs what the uninterrupted one does.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.model.moe import MoE
from nanochat_cli.training.part import MicroBatch, Part, Setup
from nanochat_cli.training.progress import Progress


class ExpertBalance(Part):
    """Balances and counts all mixtures of the model."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.mixtures = dict(setup.model.mixtures())
        self._counters = [counter for moe in self.mixtures.values() for counter in (moe.load, moe.dropped)]
        self._before: list[Tensor] = []

    def counters(self) -> list[Tensor]:
        return self._counters

    def begin(self, progress: Progress) -> None:
        self._before = [counter.clone() for counter in self._counters]

    def before_forward(self, micro: MicroBatch) -> None:
        for moe in self.mixtures.values():
            moe.loss_scale.fill_(micro.share)

    def end(self, *, failed: bool) -> None:
        """Tokens that have to be read again count once."""
        if failed:
            for counter, value in zip(self._counters, self._before, strict=True):
                counter.copy_(value)

    def metrics(self, progress: Progress) -> dict[str, Tensor]:
        return measure_load([*self.mixtures.values()]) if self._is_logged(progress) else {}

    def after_step(self, progress: Progress, metrics: Mapping[str, float], *, taken: bool) -> None:
        if taken:
            for moe in self.mixtures.values():
                moe.update_balance()
        if self._is_logged(progress) or self.setup.config.model.moe.balance == "bias":  # it follows one step's load
            for counter in self._counters:
                counter.zero_()

    def tensors(self) -> dict[str, Any]:
        return {"expert_load": {name: {"load": m.load, "dropped": m.dropped} for name, m in self.mixtures.items()}}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        for name, moe in self.mixtures.items():
            moe.load.copy_(tensors["expert_load"][name]["load"])
            moe.dropped.copy_(tensors["expert_load"][name]["dropped"])

    def _is_logged(self, progress: Progress) -> bool:
        return (progress.step + 1) % self.setup.config.train.log_interval == 0


def measure_load(mixtures: Sequence[MoE]) -> dict[str, Tensor]:
    """Spread and maximum of the tokens per expert, relative to their mean, and the share dropped: 0-dim each."""
    load = torch.stack([moe.load for moe in mixtures])
    spread = (load.std(dim=1, correction=0) / load.mean(dim=1)).mean()
    largest = (load.amax(dim=1) / load.mean(dim=1)).max()
    dropped = torch.stack([moe.dropped for moe in mixtures]).sum() / load.sum()
    return {"moe/load_spread": spread, "moe/largest_load": largest, "moe/dropped": dropped}
