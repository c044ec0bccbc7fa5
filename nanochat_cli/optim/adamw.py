"""AdamW (arXiv:1711.05101) through `torch.optim.AdamW`, with state addressed by parameter name."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AdamW:
    """torch's fused AdamW over named parameters, with the interface of the other optimizers here."""

    state_names = frozenset({"step", "exp_avg", "exp_avg_sq"})

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self.names, self.parameters = map(list, zip(*parameters, strict=True))
        self.inner = torch.optim.AdamW(self.parameters, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    def step(self, lr: float) -> None:
        self.inner.param_groups[0]["lr"] = lr
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(self.inner.state[p]) for name, p in zip(self.names, self.parameters, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if state.get(name):
                self.inner.state[parameter] = {k: v.clone().to(parameter.device) for k, v in state[name].items()}

    def state_tensors(self) -> list[Tensor]:
        return [t for p in self.parameters for t in self.inner.state[p].values() if t.ndim]
