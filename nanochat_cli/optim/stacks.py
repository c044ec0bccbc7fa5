"""Stacks of matrices of equal shape, so that a computation on all of them is one batched call."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Shape = tuple[int, int]
CHUNK = 2**25
"""Most elements computed together (but at least one parameter): they bound a step's memory besides its state."""


@dataclass(frozen=True)
class Member:
    """A parameter [count · R, C] and its `count` matrices' places in the stack of its shape."""

    name: str
    parameter: nn.Parameter
    start: int
    count: int

    @property
    def rows(self) -> slice | int:
        """Index into the stack: a single matrix has no leading dimension, as in a checkpoint."""
        return self.start if self.count == 1 else slice(self.start, self.start + self.count)


def stack(
    parameters: Iterable[tuple[str, nn.Parameter]], matrices: Mapping[str, int] | None = None
) -> dict[Shape, list[Member]]:
    """Members by shape (R, C). matrices: how many of equal height a parameter holds, by name, if more than one."""
    stacks: dict[Shape, list[Member]] = {}
    for name, parameter in parameters:
        if parameter.ndim != 2:
            raise ValueError(f"Muon takes matrices; {name} has shape {tuple(parameter.shape)}")
        count = (matrices or {}).get(name, 1)
        members = stacks.setdefault((parameter.shape[0] // count, parameter.shape[1]), [])
        members.append(Member(name, parameter, sum(member.count for member in members), count))
    return stacks


def size(members: list[Member]) -> int:
    """The number of matrices."""
    return sum(member.count for member in members)


def device_of(members: list[Member]) -> torch.device:
    return members[0].parameter.device


def chunks(members: list[Member]) -> Iterator[tuple[slice, list[Member]]]:
    """Neighbouring members of up to CHUNK elements, and their places in the stack."""
    part: list[Member] = []
    elements = 0
    for member in members:
        if part and elements + member.parameter.numel() > CHUNK:
            yield _places(part), part
            part, elements = [], 0
        part.append(member)
        elements += member.parameter.numel()
    yield _places(part), part


def _places(members: list[Member]) -> slice:
    return slice(members[0].start, members[-1].start + members[-1].count)


def gradients(shape: Shape, members: list[Member]) -> Tensor | None:
    """float32 [n, R, C], new memory; None if a gradient is missing."""
    present = [g.reshape(-1, *shape) for member in members if (g := member.parameter.grad) is not None]
    return torch.cat(present).float() if len(present) == len(members) else None


def apply(
    members: list[Member], updates: Tensor, lr: float, factor: float, weight_decay: float, *, cautious: bool
) -> None:
    """w ← w − lr · factor · update after decoupled weight decay; cautious: only where the update has w's sign."""
    parts = updates.split([member.count for member in members])
    for member, part in zip(members, parts, strict=True):
        parameter, update = member.parameter, part.flatten(0, 1)
        if weight_decay and cautious:
            agrees = (parameter * update > 0).to(parameter.dtype)
            parameter.addcmul_(parameter, agrees, value=-lr * weight_decay)
        elif weight_decay:
            parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr * factor)
