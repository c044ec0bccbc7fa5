"""Embedding and head in pieces of neighbouring rows, each of which has an owner, so that none has to step a whole one.

They are stepped element by element: any rows can be stepped apart. Which rows are a piece depends on the shape alone,
not on the number of ranks, and a checkpoint has the whole.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.training.distributed.group import Group

DIVIDED = ("embedding.weight", "head.weight")
SMALLEST = 2**20
"""Numbers in a piece."""
ALIGNED = 2048
"""Numbers of which a piece is a multiple: the largest block of state in 8 bits, none of which spans two pieces."""

State = dict[str, Tensor]


def rows_of_pieces(name: str, shape: tuple[int, ...]) -> dict[str, range]:
    """By the name of each piece; empty for what stays whole."""
    if name not in DIVIDED or math.prod(shape) % ALIGNED:
        return {}
    rows, width = shape
    step = ALIGNED // math.gcd(width, ALIGNED)
    step *= -(-SMALLEST // (step * width))
    ends = [*range(step, rows - step + 1, step), rows]
    starts = [0, *ends[:-1]]
    return {f"{name}[{start}:{end}]": range(start, end) for start, end in zip(starts, ends, strict=True)}


class Pieces:
    """parameters: all that are trained, by name; here with pieces, which share its memory, in place of a whole one."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.rows: dict[str, dict[str, range]] = {}
        """Of the pieces of each divided parameter, by its name."""
        self.parameters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            rows_of = rows_of_pieces(name, tuple(parameter.shape))
            if len(rows_of) < 2:
                self.parameters[name] = parameter
                continue
            self.rows[name] = rows_of
            for piece, rows in rows_of.items():
                self.parameters[piece] = nn.Parameter(parameter.detach()[rows.start : rows.stop])
        self._wholes = {name: parameters[name] for name in self.rows}

    def take_gradients(self) -> None:
        """Give the gradient of each divided parameter to its pieces."""
        for name, whole in self._wholes.items():
            for piece, rows in self.rows[name].items():
                self.parameters[piece].grad = None if whole.grad is None else whole.grad[rows.start : rows.stop]
            whole.grad = None

    def writers(self, owner: Mapping[str, int]) -> dict[str, int]:
        """The rank that writes each divided parameter: the owner of its first piece."""
        return {name: owner[next(iter(rows_of))] for name, rows_of in self.rows.items()}

    def joined(self, states: Mapping[str, dict[str, State]], owner: Mapping[str, int], group: Group) -> dict[str, Any]:
        """State by optimizer group and parameter, that of divided ones whole, at the rank that writes them.

        All ranks call it; states: of their own pieces.
        """
        found = dict(states)
        for name, writer in self.writers(owner).items():
            kind = name.split(".")[0]
            own = {piece: states[kind][piece] for piece in self.rows[name] if owner[piece] == group.rank}
            whole = self._exchanged(name, own, owner, writer, group)
            found.pop(kind, None)
            if whole is not None:
                found[kind] = {name: whole}
        return found

    def _exchanged(
        self, name: str, own: Mapping[str, State], owner: Mapping[str, int], writer: int, group: Group
    ) -> State | None:
        rows_of = self.rows[name]
        keys = sorted(key for key, tensor in next(iter(own.values()), {}).items() if tensor.ndim)
        flat = [state[key].contiguous().view(-1).view(torch.uint8) for state in own.values() for key in keys]
        nothing = torch.zeros(0, dtype=torch.uint8, device=group.device)
        parts = [torch.cat([nothing, *(flat if rank == writer else ())]) for rank in range(group.size)]
        if group.rank != writer:
            group.exchange(parts, [0] * group.size)
            return None
        (piece, first), *_ = own.items()
        rows = len(rows_of[piece])
        sizes = {piece: [first[key].nbytes * len(of) // rows for key in keys] for piece, of in rows_of.items()}
        theirs = [[piece for piece in rows_of if owner[piece] == rank] for rank in range(group.size)]
        received = group.exchange(parts, [sum(sum(sizes[piece]) for piece in of_rank) for of_rank in theirs])
        pieces: dict[tuple[str, str], Tensor] = {}
        for of_rank, data in zip(theirs, received, strict=True):
            places = [(piece, key) for piece in of_rank for key in keys]
            tensors = data.split([size for piece in of_rank for size in sizes[piece]])
            for (piece, key), tensor in zip(places, tensors, strict=True):
                pieces[piece, key] = tensor.view(first[key].dtype).view(-1, *first[key].shape[1:])
        return {
            key: torch.cat([pieces[piece, key] for piece in rows_of]) if key in keys else tensor
            for key, tensor in first.items()
        }

    def divided(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """State as a checkpoint has it, with that of all pieces in place of the whole's."""
        found = dict(states)
        for name, rows_of in self.rows.items():
            kind, total = name.split(".")[0], list(rows_of.values())[-1].stop
            if whole := found.get(kind, {}).get(name):
                found[kind] = {
                    piece: {key: _part(tensor, rows, total) for key, tensor in whole.items()}
                    for piece, rows in rows_of.items()
                }
        return found


def _part(tensor: Tensor, rows: range, total: int) -> Tensor:
    """Of state with as many items for each row, or of a single number."""
    return tensor[rows.start * len(tensor) // total : rows.stop * len(tensor) // total] if tensor.ndim else tensor
