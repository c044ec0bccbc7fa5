"""GaLore: optimizer state in a low-rank subspace of the gradient (arXiv:2403.03507, 2504.20437), Muon or AdamW inside.

    every update_freq steps: P ← leading r left singular vectors of G;  m ← (P_newᵀ P_old) m
    w ← w − lr · α · P · step(Pᵀ G)

G is taken with its smaller side first, so one formula serves both sides. The state of a matrix is P [S, r] and its
moments [r, L], whole or in 8 bits; a matrix whose smaller side is at most r is not projected, and α is 1. With
`unbiased` (GUM, arXiv:2510.17802) every period of update_freq steps draws parameters that step in full by what P
leaves out, (G − P Pᵀ G) / q, while the others step by Pᵀ G / (1 − q): the mean is G. Momentum restarts in each period.

All randomness derives from the number of the step, which is in the checkpoint.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.optim import GaLoreConfig
from nanochat_cli.optim.newton_schulz import Coefficients, NumberFormat, orthogonalize
from nanochat_cli.optim.quantized_state import Code, QuantizedState, WholeState, copy_states, make_state
from nanochat_cli.optim.stacks import Member, Shape, apply, chunks, device_of, gradients, size, stack
from nanochat_cli.optim.subspace import leading_basis, seeded

Inner = Literal["muon", "adamw"]
Kind = Literal["whole", "projected", "complement"]
MOMENTS: dict[Inner, dict[str, Code]] = {
    "muon": {"momentum": "linear"},
    "adamw": {"exp_avg": "dynamic", "exp_avg_sq": "unsigned"},
}
DEFAULT_SCALE: dict[Inner, float] = {"muon": 1.0, "adamw": 0.25}
"""α. The paper's 0.25 is for Adam; an orthogonalised step has the same length inside a subspace as outside."""


@dataclass
class Section:
    """Matrices of a shape that are stepped alike. projections: None if nothing is projected."""

    kind: Kind
    members: list[Member]
    projections: WholeState | QuantizedState | None
    moments: dict[str, WholeState | QuantizedState]

    def states(self) -> dict[str, WholeState | QuantizedState]:
        return self.moments if self.projections is None else {"projection": self.projections} | self.moments


@dataclass
class Stack:
    """All matrices of a shape [R, C]. steps: done so far; refreshed: members with a new subspace for the next step.

    collected: projected gradients [count, r, L] by name, if whole gradients are released in the backward pass.
    """

    shape: Shape
    members: list[Member]
    sections: list[Section]
    steps: int = 0
    collected: dict[str, Tensor] = field(default_factory=dict)
    refreshed: set[str] = field(default_factory=set)

    @property
    def tall(self) -> bool:
        return self.shape[0] > self.shape[1]

    def turned(self, matrices: Tensor) -> Tensor:
        """[n, R, C] ↔ [n, S, L], smaller side first."""
        return matrices.mT if self.tall else matrices


class GaLore:
    """GaLore over named 2-D parameters; `step(lr)` reads `.grad` (or what was collected) and updates in place.

    matrices: how many matrices of equal height a parameter holds, by name, if more than one.
    state_block: elements of 8-bit state that share a scale; None keeps it in float32.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        config: GaLoreConfig,
        *,
        inner: Inner = "muon",
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        coefficients: Coefficients = "keller-jordan",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        cautious: bool = False,
        number_format: NumberFormat | None = None,
        matrices: Mapping[str, int] | None = None,
        state_block: int | None = None,
    ) -> None:
        self.config, self.state_block = config, state_block
        self.inner: Inner = inner
        self.scale = DEFAULT_SCALE[inner] if config.scale is None else config.scale
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.coefficients: Coefficients = coefficients
        self.betas, self.eps = betas, eps
        self.weight_decay, self.cautious = weight_decay, cautious
        self.number_format: NumberFormat | None = number_format
        self.stacks = [Stack(shape, members, []) for shape, members in stack(parameters, matrices).items()]
        for one in self.stacks:
            one.sections = self._sections(one, 0)
            if config.release_gradients and one.sections[0].kind == "projected":
                for member in one.members:
                    self._release(one, one.sections[0], member)

    def _sections(self, one: Stack, period: int) -> list[Section]:
        """Fresh state of a stack, for a period."""
        short, long = sorted(one.shape)
        if self.config.rank >= short:
            return [Section("whole", one.members, None, self._moments(one.members, (short, long)))]
        if not self.config.unbiased:
            return [self._section("projected", one.members, short, long)]
        drawn = self._draw(one, period)
        low = [member for i, member in enumerate(one.members) if i not in drawn]
        full = [member for i, member in enumerate(one.members) if i in drawn]
        kinds: list[tuple[Kind, list[Member]]] = [("projected", low), ("complement", full)]
        return [self._section(kind, _restacked(members), short, long) for kind, members in kinds if members]

    def _section(self, kind: Kind, members: list[Member], short: int, long: int) -> Section:
        rows = self.config.rank if kind == "projected" else short
        shape = (short, self.config.rank)
        projections = make_state(size(members), shape, device_of(members), block=self.state_block)
        return Section(kind, members, projections, self._moments(members, (rows, long)))

    def _moments(self, members: list[Member], shape: Shape) -> dict[str, WholeState | QuantizedState]:
        device = device_of(members)
        return {
            name: make_state(size(members), shape, device, code, self.state_block)
            for name, code in MOMENTS[self.inner].items()
        }

    def _draw(self, one: Stack, period: int) -> set[int]:
        """Members that step in full, each with probability full_rank_share; their number varies by one at most."""
        generator = seeded(period, *one.shape)
        offset = torch.rand((), dtype=torch.float64, generator=generator).item()
        count = math.floor(self.config.full_rank_share * len(one.members) + offset)
        return set(torch.randperm(len(one.members), generator=generator)[:count].tolist())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of every shape whose parameters all have gradients."""
        for one in self.stacks:
            if any(m.parameter.grad is None and m.name not in one.collected for m in one.members):
                continue
            if self.config.unbiased and self._due(one):
                one.sections = self._sections(one, one.steps // self.config.update_freq)
            for section in one.sections:
                self._step_section(one, section, lr)
            one.steps += 1
            one.refreshed.clear()

    def _step_section(self, one: Stack, section: Section, lr: float) -> None:
        factor = math.sqrt(max(1.0, one.shape[0] / one.shape[1])) if self.inner == "muon" else 1.0
        if section.kind == "projected" and not self.config.unbiased:
            factor *= self.scale
        for places, part in chunks(section.members):
            projection = None
            if part[0].name in one.collected:
                assert section.projections is not None
                projection = section.projections.read(places)
                gradient = torch.cat([one.collected[member.name] for member in part])
            else:
                whole = gradients(one.shape, part)
                assert whole is not None
                gradient = one.turned(whole)
                if section.projections is not None:
                    if self._due(one):
                        self._refresh(one, section, places, gradient)
                    projection = section.projections.read(places)
                gradient = self._inside(section.kind, gradient, projection)
            update = self._inner_step(one, section, places, gradient)
            if section.kind == "projected":
                assert projection is not None
                update = projection @ update
            apply(part, one.turned(update), lr, factor, self.weight_decay, cautious=self.cautious)

    def _due(self, one: Stack) -> bool:
        return one.steps % self.config.update_freq == 0

    def _refresh(self, one: Stack, section: Section, places: slice, gradient: Tensor) -> None:
        """Compute new subspaces from gradient [n, S, L], and move the moments into them."""
        assert section.projections is not None
        old = section.projections.read(places)
        new = leading_basis(
            gradient,
            self.config.rank,
            oversampling=self.config.oversampling,
            power_iterations=self.config.power_iterations,
            generator=seeded(one.steps, *one.shape),
        )
        if one.steps and not self.config.unbiased:
            rotation = new.mT @ old
            for name, state in section.moments.items():
                matrix = rotation.square() if name == "exp_avg_sq" else rotation
                state.write(places, matrix @ state.read(places))
        section.projections.write(places, new)

    def _inside(self, kind: Kind, gradient: Tensor, projection: Tensor | None) -> Tensor:
        """The inner optimizer's gradient: [n, r, L], or [n, S, L] if the parameters step in full."""
        if projection is None:
            return gradient
        low = projection.mT @ gradient
        share = self.config.full_rank_share
        if kind == "complement":
            return (gradient - projection @ low).div_(share)
        return low.div_(1 - share) if self.config.unbiased else low

    def _inner_step(self, one: Stack, section: Section, places: slice, gradient: Tensor) -> Tensor:
        """Update the moments and return the step; may overwrite gradient."""
        if self.inner == "adamw":
            states = [section.moments[name] for name in MOMENTS["adamw"]]
            mean = states[0].read(places).lerp_(gradient, 1 - self.betas[0])
            square = states[1].read(places).lerp_(gradient.square(), 1 - self.betas[1])
            correction = [1 - beta ** (one.steps + 1) for beta in self.betas]
            update = (mean / correction[0]).div_((square / correction[1]).sqrt_().add_(self.eps))
            states[0].write(places, mean)
            states[1].write(places, square)
            return update
        state = section.moments["momentum"]
        buffer = state.read(places).lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(buffer, self.momentum) if self.nesterov else buffer
        state.write(places, buffer)
        return orthogonalize(update, self.ns_steps, self.coefficients, number_format=self.number_format)

    def _release(self, one: Stack, section: Section, member: Member) -> None:
        """Project the parameter's gradient as soon as it is computed, and drop it."""

        @torch.no_grad()
        def project(parameter: Tensor) -> None:
            assert parameter.grad is not None
            assert section.projections is not None
            gradient = one.turned(parameter.grad.reshape(-1, *one.shape).float())
            parameter.grad = None
            places = slice(member.start, member.start + member.count)
            if self._due(one) and member.name not in one.refreshed:
                self._refresh(one, section, places, gradient)
                one.refreshed.add(member.name)
            low = section.projections.read(places).mT @ gradient
            if member.name in one.collected:
                one.collected[member.name] += low
            else:
                one.collected[member.name] = low

        member.parameter.register_post_accumulate_grad_hook(project)

    def zero_grad(self) -> None:
        for one in self.stacks:
            one.collected.clear()
            one.refreshed.clear()

    def collected_gradients(self) -> Iterator[Tensor]:
        """Projected gradients in place of released ones, for the norm and for clipping."""
        for one in self.stacks:
            yield from one.collected.values()

    def state_dict(self) -> dict[str, Any]:
        return {
            member.name: {"step": torch.tensor(float(one.steps))}
            | {
                kind + suffix: tensor
                for kind, state in section.states().items()
                for suffix, tensor in state.saved(member.rows).items()
            }
            for one in self.stacks
            for section in one.sections
            for member in section.members
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for one in self.stacks:
            one.steps = int(state[one.members[0].name]["step"])
            if self.config.unbiased:
                one.sections = self._sections(one, max(one.steps - 1, 0) // self.config.update_freq)
        copy_states(self.state_dict(), state)

    def state_tensors(self) -> list[Tensor]:
        sections = [section for one in self.stacks for section in one.sections]
        return [tensor for section in sections for state in section.states().values() for tensor in state.tensors()]


def _restacked(members: list[Member]) -> list[Member]:
    """The same parameters, with places in a stack of their own."""
    start, result = 0, []
    for member in members:
        result.append(replace(member, start=start))
        start += member.count
    return result
