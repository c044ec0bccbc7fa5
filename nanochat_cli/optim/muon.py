"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    m ← lerp(m, g, 1 − β);  u = lerp(g, m, β) if nesterov else m
    w ← w − lr · sqrt(max(1, rows / cols)) · NewtonSchulz(u),  after decoupled weight decay

Same-shape matrices are stacked and iterated together. The momentum of a shape is one tensor [n, R, C]. A parameter that
holds several matrices under each other (the experts of a mixture) is orthogonalised one matrix at a time.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.optim.newton_schulz import Coefficients, orthogonalize


@dataclass(frozen=True)
class Member:
    """A parameter [count · R, C] and its `count` matrices' places in the stacks of its shape."""

    name: str
    parameter: nn.Parameter
    start: int
    count: int

    @property
    def rows(self) -> slice | int:
        """A single matrix without a leading dimension: what a checkpoint holds."""
        return self.start if self.count == 1 else slice(self.start, self.start + self.count)


class Muon:
    """Muon over named 2-D parameters; `step(lr)` reads `.grad` and updates in place.

    matrices: by name, of the parameters that hold more than one matrix of equal height.
    """

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
        equilibrate: bool = False,
        variance_beta: float = 0.0,
        iteration_dtype: torch.dtype | None = None,
        matrices: Mapping[str, int] | None = None,
    ) -> None:
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.coefficients: Coefficients = coefficients
        self.weight_decay, self.cautious = weight_decay, cautious
        self.equilibrate, self.variance_beta = equilibrate, variance_beta
        self.groups: dict[tuple[int, int], list[Member]] = {}
        for name, parameter in parameters:
            if parameter.ndim != 2:
                raise ValueError(f"Muon takes matrices; {name} has shape {tuple(parameter.shape)}")
            count = (matrices or {}).get(name, 1)
            members = self.groups.setdefault((parameter.shape[0] // count, parameter.shape[1]), [])
            members.append(Member(name, parameter, sum(member.count for member in members), count))
        sizes = {shape: sum(member.count for member in members) for shape, members in self.groups.items()}
        self.buffers = {
            shape: torch.zeros(sizes[shape], *shape, device=members[0].parameter.device)
            for shape, members in self.groups.items()
        }
        self.second_moments = {
            shape: torch.zeros(sizes[shape], shape[0], 1, device=members[0].parameter.device)
            for shape, members in self.groups.items()
            if variance_beta
        }
        self.iteration_dtype = iteration_dtype

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient; a group without gradients is left alone."""
        for shape, members in self.groups.items():
            parameters: list[Tensor] = [member.parameter for member in members]
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if len(gradients) < len(parameters):
                continue
            gradient = torch.cat([g.reshape(-1, *shape) for g in gradients]).float()
            buffer = self.buffers[shape]
            buffer.lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp_(buffer, self.momentum) if self.nesterov else buffer
            if self.equilibrate:
                update = equilibrate_rows(update)
            update = orthogonalize(update.to(self._dtype(update)), self.ns_steps, self.coefficients).float()
            if self.variance_beta:
                update = reduce_row_variance(update, self.second_moments[shape], self.variance_beta)
            updates = [part.flatten(0, 1) for part in update.split([member.count for member in members])]
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

    def _states(self) -> dict[str, dict[tuple[int, int], Tensor]]:
        """State name → shape → stacked tensor; `second_moment` only where it is used."""
        return {"momentum": self.buffers} | ({"second_moment": self.second_moments} if self.variance_beta else {})

    def state_dict(self) -> dict[str, Any]:
        return {
            member.name: {kind: stacks[shape][member.rows] for kind, stacks in self._states().items()}
            for shape, members in self.groups.items()
            for member in members
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for shape, members in self.groups.items():
            for member in members:
                for kind, stacks in self._states().items():
                    stacks[shape][member.rows].copy_(state[member.name][kind])

    def state_tensors(self) -> list[Tensor]:
        return [stack for stacks in self._states().values() for stack in stacks.values()]


def equilibrate_rows(matrices: Tensor) -> Tensor:
    """Scale every row of matrices [n, R, C] to the root mean square of the row norms (MuonEq, arXiv:2603.28254)."""
    norms = matrices.norm(dim=-1, keepdim=True)
    target = norms.square().mean(dim=-2, keepdim=True).sqrt()
    return matrices * (target / norms.clamp(min=1e-12))


def reduce_row_variance(updates: Tensor, second_moment: Tensor, beta: float) -> Tensor:
    """Divide each row by the root of its running mean square (NorMuon, arXiv:2510.05491), then fix the size.

    updates: [n, R, C], orthogonalised; second_moment: [n, R, 1], changed in place. The result has the Frobenius norm
    sqrt(min(R, C)) of an exactly semi-orthogonal matrix, whatever the iteration left (Muon+, arXiv:2602.21545).
    """
    second_moment.lerp_(updates.square().mean(dim=-1, keepdim=True), 1 - beta)
    scaled = updates * second_moment.clamp(min=1e-20).rsqrt()
    target = math.sqrt(min(updates.shape[-2:]))
    return scaled * (target / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))
