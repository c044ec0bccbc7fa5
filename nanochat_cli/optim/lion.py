"""Lion: the sign of an interpolated momentum (arXiv:2302.06675, Algorithm 2), decoupled weight decay."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Lion:
    """Lion over named parameters; `step(lr)` reads `.grad` and updates in place."""

    state_names = frozenset({"momentum"})

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        self.names, self.parameters = map(list, zip(*parameters, strict=True))
        self.betas, self.weight_decay = betas, weight_decay
        self.momentum = [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, momentum in zip(self.parameters, self.momentum, strict=True):
            if parameter.grad is None:
                continue
            update = torch.lerp(parameter.grad.float(), momentum, self.betas[0]).sign_()
            if self.weight_decay:
                parameter.mul_(1 - lr * self.weight_decay)
            parameter.add_(update, alpha=-lr)
            momentum.lerp_(parameter.grad.float(), 1 - self.betas[1])

    def state_dict(self) -> dict[str, Any]:
        return {name: {"momentum": m} for name, m in zip(self.names, self.momentum, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, momentum in zip(self.names, self.momentum, strict=True):
            momentum.copy_(state[name]["momentum"])

    def state_tensors(self) -> list[Tensor]:
        return list(self.momentum)
