"""AdamW (arXiv:1711.05101): torch's fused one in float32, and one with its moments in 8 bits (arXiv:2110.02861)."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.optim.flat_state import flat_state, pieces, saved
from nanochat_cli.optim.quantized_state import copy_states


class AdamW:
    """torch's fused AdamW over named parameters, with the interface of the other optimizers here."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        self.names, self.parameters = map(list, zip(*parameters, strict=True))
        self.weight_decay = weight_decay
        fused = not any(p.is_meta for p in self.parameters)
        self.inner = torch.optim.AdamW(self.parameters, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        for p in self.parameters:  # what torch would allocate in the first step
            state = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
            self.inner.state[p] = state | {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def step(self, lr: float) -> None:
        self.inner.param_groups[0].update(lr=lr, weight_decay=self.weight_decay)
        self.inner.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: dict(self.inner.state[p]) for name, p in zip(self.names, self.parameters, strict=True)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, parameter in zip(self.names, self.parameters, strict=True):
            if state.get(name):
                self.inner.state[parameter] = {k: v.clone().to(parameter.device) for k, v in state[name].items()}

    def state_tensors(self) -> list[Tensor]:
        return [t for p in self.parameters for t in self.inner.state[p].values() if t.ndim]


class AdamW8bit:
    """AdamW with both moments in the dynamic maps, one scale per `state_block` elements."""

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
        state_block: int,
    ) -> None:
        self.names, self.parameters = map(list, zip(*parameters, strict=True))
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.steps = [torch.zeros(()) for _ in self.parameters]
        """Updates of each parameter so far, on the CPU."""
        self.first = [flat_state(p, "dynamic", state_block) for p in self.parameters]
        self.second = [flat_state(p, "unsigned", state_block) for p in self.parameters]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for parameter, steps, first, second in zip(self.parameters, self.steps, self.first, self.second, strict=True):
            if parameter.grad is None:
                continue
            steps += 1
            correction = [1 - beta ** steps.item() for beta in self.betas]
            for piece in pieces(parameter, first):
                mean = first.read(piece.items).lerp_(piece.gradient, 1 - self.betas[0])
                square = second.read(piece.items).lerp_(piece.gradient.square(), 1 - self.betas[1])
                update = mean / (square.sqrt() / math.sqrt(correction[1])).add_(self.eps)
                if self.weight_decay:
                    piece.parameter.mul_(1 - lr * self.weight_decay)
                piece.parameter.add_(piece.flat(update), alpha=-lr / correction[0])
                first.write(piece.items, mean)
                second.write(piece.items, square)

    def state_dict(self) -> dict[str, Any]:
        states = zip(self.names, self.steps, self.first, self.second, strict=True)
        return {n: {"step": t} | saved("exp_avg", m) | saved("exp_avg_sq", v) for n, t, m, v in states}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        copy_states(self.state_dict(), state)

    def state_tensors(self) -> list[Tensor]:
        return [tensor for state in (*self.first, *self.second) for tensor in state.tensors()]
