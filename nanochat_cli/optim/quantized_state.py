"""Stored optimizer state: whole (float32) or in 8 bits with one float32 scale per block.

A state tensor is a stack of items of equal shape. `read` gives items as float32, `write` stores float32 values; an
optimizer computes between the two and does not know how they are stored. Three codes, all relative to the block's
largest magnitude: `linear`, int8 / 127 (8-bit Muon, arXiv:2509.23106); `dynamic` and `unsigned`, uint8 places in the
dynamic maps of the 8-bit optimizers (arXiv:2110.02861, section 2.2), for values of which a sign or a root is taken.
Nothing here waits for the device.
"""

import math
from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_cli.errors import DataError

Code = Literal["linear", "dynamic", "unsigned"]
CELL_BITS = 15
"""Low bits of a float32 that do not affect its cell; see `nearest`."""
CELLS = 2 ** (32 - CELL_BITS)


class WholeState:
    suffixes = ("",)

    def __init__(self, items: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.values = torch.zeros(items, *shape, device=device)

    def read(self, items: slice) -> Tensor:
        return self.values[items]

    def write(self, items: slice, values: Tensor) -> None:
        target = self.values[items]
        if target.data_ptr() != values.data_ptr():
            target.copy_(values)

    def saved(self, items: slice | int) -> dict[str, Tensor]:
        return {"": self.values[items]}

    def tensors(self) -> list[Tensor]:
        return [self.values]


class QuantizedState:
    """8 bits per element. codes: [items, blocks, block]; scales: float32 [items, blocks]. No block spans two items."""

    suffixes = ("_codes", "_scales")

    def __init__(self, items: int, shape: tuple[int, ...], device: torch.device, code: Code, block: int) -> None:
        self.shape = shape
        self.code: Code = code
        self.size = math.prod(shape)
        block = min(block, self.size)
        blocks = -(-self.size // block)
        dtype = torch.int8 if code == "linear" else torch.uint8
        self.codes = torch.full((items, blocks, block), _zero(code), dtype=dtype, device=device)
        self.scales = torch.zeros(items, blocks, device=device)

    def read(self, items: slice) -> Tensor:
        values = dequantize(self.codes[items], self.scales[items], self.code).flatten(1)
        return values[:, : self.size].unflatten(1, self.shape)

    def write(self, items: slice, values: Tensor) -> None:
        codes = self.codes[items]
        flat = values.reshape(len(values), self.size)
        padding = codes[0].numel() - self.size
        blocks = (F.pad(flat, (0, padding)) if padding else flat).view(codes.shape)
        quantize_into(blocks, codes, self.scales[items], self.code)

    def saved(self, items: slice | int) -> dict[str, Tensor]:
        return {"_codes": self.codes[items], "_scales": self.scales[items]}

    def tensors(self) -> list[Tensor]:
        return [self.codes, self.scales]


def make_state(
    items: int, shape: tuple[int, ...], device: torch.device, code: Code = "linear", block: int | None = None
) -> WholeState | QuantizedState:
    """A state of zeros. block: elements that share a scale; None keeps float32."""
    if block is None:
        return WholeState(items, shape, device)
    return QuantizedState(items, shape, device, code, block)


def quantize_into(blocks: Tensor, codes: Tensor, scales: Tensor, code: Code) -> None:
    """Write the nearest codes of float32 blocks [..., block] and their scales [...].

    The error is at most scale / 2 for `linear`. An `unsigned` value that is not zero never becomes zero: a second
    moment of zero would make its step unbounded.
    """
    largest = blocks.abs().amax(dim=-1)
    if code == "linear":
        scales.copy_(largest).div_(127)
        inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)  # infinite for a denormal scale
        scaled = blocks * inverse.clamp_(max=torch.finfo(torch.float32).max)[..., None]
        codes.copy_(scaled.round_().clamp_(-127, 127))
        return
    scales.copy_(largest)
    relative = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    places = nearest(relative, code)
    if code == "unsigned":
        places = places.clamp_(min=1).mul_(blocks > 0)
    codes.copy_(places)


def nearest(values: Tensor, code: Code) -> Tensor:
    """uint8 places of float32 values, at most 1, in the map of `code`: torch.bucketize's, some 30 times faster.

    Sign, exponent and 8 bits of mantissa identify a cell of floats with at most one boundary of the map in it.
    """
    first, boundary = _cells(code, str(values.device))
    flat = values.reshape(-1)
    cells = (flat.view(torch.int32) >> CELL_BITS).bitwise_and_(CELLS - 1)
    return first.index_select(0, cells).add_(flat > boundary.index_select(0, cells)).view(values.shape)


def dequantize(codes: Tensor, scales: Tensor, code: Code) -> Tensor:
    """float32 values of codes [..., block] with scales [...]."""
    if code == "linear":
        return codes.float().mul_(scales[..., None])
    values = _values(code, str(codes.device)).index_select(0, codes.reshape(-1).int())
    return values.view(codes.shape).mul_(scales[..., None])


def dynamic_map(*, signed: bool) -> list[float]:
    """The 256 values of the dynamic map, ascending: 7 decades, with twice the fraction steps in each higher one."""
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        width = 0.9 / steps
        means = [(0.1 + width * (i + 0.5)) * 10.0 ** (exponent - 6) for i in range(steps)]
        values += [*means, *(-m for m in means)] if signed else means
    return sorted(values)


def _zero(code: Code) -> int:
    return 0 if code == "linear" else dynamic_map(signed=code == "dynamic").index(0.0)


@cache
def _values(code: Code, device: str) -> Tensor:
    return torch.tensor(dynamic_map(signed=code == "dynamic"), device=device)


@cache
def _cells(code: Code, device: str) -> tuple[Tensor, Tensor]:
    """For each cell: the place of its lowest float, and the boundary above which a float has the next place."""
    values = torch.tensor(dynamic_map(signed=code == "dynamic"), dtype=torch.float64)
    boundaries = ((values[1:] + values[:-1]) / 2).float()
    bits = torch.arange(CELLS) << CELL_BITS
    ends = torch.stack((bits, bits + 2**CELL_BITS - 1)).add(2**31).remainder(2**32).sub(2**31).to(torch.int32)
    first = torch.bucketize(ends.view(torch.float32), boundaries).amin(dim=0)  # negative cells end at their lowest
    above = torch.cat((boundaries, torch.tensor([math.inf])))[first]
    return first.to(torch.uint8).to(device), above.to(device)


def copy_states(own: Mapping[str, Mapping[str, Tensor]], saved: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Copy saved state, by parameter and name, into an optimizer's own. Raises DataError for other ranks or blocks."""
    for parameter, state in own.items():
        for key, target in state.items():
            source = saved[parameter][key]
            if target.shape != source.shape:
                raise DataError(
                    f"the checkpoint's {key} of {parameter} has the shape {tuple(source.shape)}, not "
                    f"{tuple(target.shape)}: resume with the optim.state_block and optim.galore settings it was "
                    "trained with"
                )
            target.copy_(source)
