"""Lion: the sign of an interpolated momentum (arXiv:2302.06675, Algorithm 2), decoupled weight decay."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.optim.flat_state import flat_state, pieces, saved
from nanochat_cli.optim.quantized_state import copy_states


class Lion:
    """Lion over named parameters; `step(lr)` reads `.grad` and updates in place.

    state_block: elements of 8-bit momentum that share a scale; None keeps it in float32.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        state_block: int | None = None,
    ) -> None:
        self.names, self.parameters = map(list, zip(*parameters, strict=True))
        self.betas, self.weight_decay = betas, weight_decay
        self.momentum = [flat_state(p, "dynamic", state_block) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, state in zip(self.parameters, self.momentum, strict=True):
            if parameter.grad is None:
                continue
            for piece in pieces(parameter, state):
                momentum = state.read(piece.items)
                update = torch.lerp(piece.gradient, momentum, self.betas[0]).sign_()
                if self.weight_decay:
                    piece.parameter.mul_(1 - lr * self.weight_decay)
                piece.parameter.add_(piece.flat(update), alpha=-lr)
                state.write(piece.items, momentum.lerp_(piece.gradient, 1 - self.betas[1]))

    def state_dict(self) -> dict[str, Any]:
        return {name: saved("momentum", state) for name, state in zip(self.names, self.momentum, strict=True)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_states(self.state_dict(), state)

    def state_tensors(self) -> list[Tensor]:
        return [tensor for state in self.momentum for tensor in state.tensors()]
