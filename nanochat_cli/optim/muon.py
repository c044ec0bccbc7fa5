"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    m ← lerp(m, g, 1 − β);  u = lerp(g, m, β) if nesterov else m
    w ← w − lr · sqrt(max(1, rows / cols)) · NewtonSchulz(u),  after decoupled weight decay

Same-shape matrices are stacked and iterated together. The momentum of a shape is one tensor [n, R, C].
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.optim.newton_schulz import Coefficients, orthogonalize


class Muon:
    """Muon over named 2-D parameters; `step(lr)` reads `.grad` and updates in place."""

    state_names = frozenset({"momentum"})

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: Coefficients = "keller-jordan",
        weight_decay: float = 0.0,
        cautious: bool = False,
        iteration_dtype: torch.dtype | None = None,
    ) -> None:
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.coefficients: Coefficients = coefficients
        self.weight_decay, self.cautious = weight_decay, cautious
        self.groups: dict[tuple[int, int], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices; {name} has shape {tuple(parameter.shape)}")
            self.groups.setdefault((parameter.shape[0], parameter.shape[1]), []).append((name, parameter))
        self.buffers = {
            shape: torch.zeros(len(members), *shape, device=members[0][1].device)
            for shape, members in self.groups.items()
        }
        self.iteration_dtype = iteration_dtype

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient; a group without gradients is left alone."""
        for shape, members in self.groups.items():
            parameters: list[Tensor] = [parameter for _, parameter in members]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if len(gradients) < len(parameters):
                continue
            gradient = torch.stack(gradients).float()
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp_(buffer, self.momentum) if self.nesterov else buffer
            update = orthogonalize(update.to(self._dtype(update)), self.ns_steps, self.coefficients).float()
            updates = list(update.unbind(0))
            self._decay(parameters, updates, lr)
            factor = -lr * math.sqrt(max(1.0, shape[0] / shape[1]))
            for parameter, change in zip(parameters, updates, strict=True):
                parameter.add_(change, alpha=factor)

    def _dtype(self, update: Tensor) -> torch.dtype:
        """bfloat16 where it is fast; on a CPU without AMX it is some 20 times slower than float32."""
        return self.iteration_dtype or (torch.bfloat16 if update.is_cuda else torch.float32)

    def _decay(self, parameters: list[Tensor], updates: list[Tensor], lr: float) -> None:
        if self.weight_decay == 0:
            return
        if not self.cautious:
            for parameter in parameters:
                parameter.mul_(1 - lr * self.weight_decay)
            return
        for parameter, update in zip(parameters, updates, strict=True):  # decay only where the update agrees
            parameter.addcmul_(parameter, (parameter * update > 0).to(parameter.dtype), value=-lr * self.weight_decay)

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"momentum": self.buffers[shape][index]}
            for shape, members in self.groups.items()
            for index, (name, _) in enumerate(members)
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for shape, members in self.groups.items():
            for index, (name, _) in enumerate(members):
                self.buffers[shape][index].copy_(state[name]["momentum"])

    def state_tensors(self) -> list[Tensor]:
        return list(self.buffers.values())
