"""Muon: momentum, orthogonalised (https://kellerjordan.github.io/posts/muon; arXiv:2502.16982).

    m ← lerp(m, g, 1 − β);  u = lerp(g, m, β) if nesterov else m
    w ← w − lr · sqrt(max(1, rows / cols)) · NewtonSchulz(u),  after decoupled weight decay

Same-shape matrices are stacked and iterated together. A shape has one momentum [n, R, C], whole or in 8 bits
(arXiv:2509.23106): the exact new momentum is quantised, and the step uses the exact one. In a parameter that holds
several matrices, one below another (the experts of a mixture), each matrix is orthogonalised separately.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.optim.newton_schulz import (
    Coefficients,
    NumberFormat,
    coefficients,
    divisor,
    orthogonalize,
    tightens,
)
from nanochat_cli.optim.quantized_state import QuantizedState, WholeState, copy_states, make_state
from nanochat_cli.optim.stacks import Member, Shape, apply, chunks, device_of, gradients, size, stack
from nanochat_kernels.muon import muon_step_int8


class Muon:
    """Muon over named 2-D parameters; `step(lr)` reads `.grad` and updates in place.

    matrices: how many matrices of equal height a parameter holds, by name, if more than one.
    state_block: elements of 8-bit momentum that share a scale; None keeps it in float32.
    """

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
        number_format: NumberFormat | None = None,
        matrices: Mapping[str, int] | None = None,
        state_block: int | None = None,
    ) -> None:
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.coefficients: Coefficients = coefficients
        self.weight_decay, self.cautious = weight_decay, cautious
        self.equilibrate, self.variance_beta = equilibrate, variance_beta
        self.number_format: NumberFormat | None = number_format
        self.groups: dict[Shape, list[Member]] = stack(parameters, matrices)
        self.buffers = {
            shape: make_state(size(members), shape, device_of(members), block=state_block)
            for shape, members in self.groups.items()
        }
        self.second_moments = {
            shape: WholeState(size(members), (shape[0], 1), device_of(members))
            for shape, members in self.groups.items()
            if variance_beta
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every parameter that has a gradient; a group without gradients is left alone."""
        for shape, members in self.groups.items():
            if any(member.parameter.grad is None for member in members):
                continue
            factor = math.sqrt(max(1.0, shape[0] / shape[1]))
            for places, part in chunks(members):
                if self._step_at_once(shape, places, part, lr, factor):
                    continue
                gradient = gradients(shape, part)
                assert gradient is not None
                updates = self._updates(shape, places, gradient)
                apply(part, updates, lr, factor, self.weight_decay, cautious=self.cautious)

    def _step_at_once(self, shape: Shape, places: slice, part: list[Member], lr: float, factor: float) -> bool:
        """Take the step in one native call, if there is one for these settings, here; else change nothing."""
        if self.number_format != "int8" or self.cautious or self.equilibrate or self.variance_beta:
            return False
        momenta = self.buffers[shape].read(places).contiguous()
        taken = muon_step_int8(
            [member.parameter.grad for member in part if member.parameter.grad is not None],
            momenta,
            [member.parameter for member in part],
            coefficients(self.coefficients, self.ns_steps),
            momentum=self.momentum,
            nesterov=self.nesterov,
            limit=divisor(self.coefficients),
            tighten=tightens(self.coefficients),
            decay=1 - lr * self.weight_decay,
            rate=-lr * factor,
        )
        if taken:
            self.buffers[shape].write(places, momenta)
        return taken

    def _updates(self, shape: Shape, places: slice, gradient: Tensor) -> Tensor:
        """Update the momentum and return the step; overwrites gradient [n, R, C]."""
        buffer = self.buffers[shape].read(places).lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp_(buffer, self.momentum) if self.nesterov else buffer
        if self.equilibrate:
            update = equilibrate_rows(update)
        update = orthogonalize(update, self.ns_steps, self.coefficients, number_format=self.number_format)
        self.buffers[shape].write(places, buffer)
        if self.variance_beta:
            update = reduce_row_variance(update, self.second_moments[shape].read(places), self.variance_beta)
        return update

    def _states(self) -> Mapping[str, Mapping[Shape, WholeState | QuantizedState]]:
        """State name → shape → stack; `second_moment` only if it is used."""
        return {"momentum": self.buffers} | ({"second_moment": self.second_moments} if self.variance_beta else {})

    def state_dict(self) -> dict[str, Any]:
        return {
            member.name: {
                kind + suffix: tensor
                for kind, stacks in self._states().items()
                for suffix, tensor in stacks[shape].saved(member.rows).items()
            }
            for shape, members in self.groups.items()
            for member in members
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_states(self.state_dict(), state)

    def state_tensors(self) -> list[Tensor]:
        return [t for stacks in self._states().values() for one in stacks.values() for t in one.tensors()]


def equilibrate_rows(matrices: Tensor) -> Tensor:
    """Scale every row of matrices [n, R, C] to the root mean square of the row norms (MuonEq, arXiv:2603.28254)."""
    norms = matrices.norm(dim=-1, keepdim=True)
    target = norms.square().mean(dim=-2, keepdim=True).sqrt()
    return matrices * (target / norms.clamp(min=1e-12))


def reduce_row_variance(updates: Tensor, second_moment: Tensor, beta: float) -> Tensor:
    """Divide each row by the root of its running mean square (NorMuon, arXiv:2510.05491), then set the norm.

    updates: [n, R, C], orthogonalised; second_moment: [n, R, 1], changed in place. The result has the Frobenius norm
    sqrt(min(R, C)) of an exactly semi-orthogonal matrix, whatever the iteration yielded (Muon+, arXiv:2602.21545).
    """
    second_moment.lerp_(updates.square().mean(dim=-1, keepdim=True), 1 - beta)
    scaled = updates * second_moment.clamp(min=1e-20).rsqrt()
    target = math.sqrt(min(updates.shape[-2:]))
    return scaled * (target / scaled.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12))
