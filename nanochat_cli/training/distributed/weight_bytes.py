"""A parameter as the bytes that travel from its owner after a step: ternary weights as codes and scales, others whole.

Four codes to a byte, and scales in float16, which they are exactly: a quarter of a byte per weight, and two per row.
"""

import math

import torch
from torch import Tensor, nn

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_kernels import Ternary

SHIFTS = (0, 2, 4, 6)


def byte_count(parameter: nn.Parameter, layer: BitLinear | None) -> int:
    """layer: the ternary one whose latent it is, if it is one."""
    if layer is None:
        return 4 * parameter.numel()
    return -(-parameter.numel() // 4) + 2 * math.prod(_scales_shape(layer))


def _scales_shape(layer: BitLinear) -> tuple[int, ...]:
    """Of what `ternarize` gives: a layer holds the one scale of a matrix once per row."""
    return (1, 1) if layer.quant.scale == "tensor" else tuple(layer.scales.shape)


def to_bytes(parameter: nn.Parameter, ternary: Ternary | None) -> Tensor:
    """uint8 [byte_count], of the float32 parameter or of its codes and scales."""
    if ternary is None:
        return parameter.detach().contiguous().view(-1).view(torch.uint8)
    packed = _pack(ternary.codes.view(1, -1)).view(-1)
    return torch.cat((packed, ternary.scales.half().view(-1).view(torch.uint8)))


def _pack(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] as uint8 [N, K / 4], rounded up; a byte has one code of each quarter of a row."""
    digits = (codes + 1).view(torch.uint8)
    first, *others = nn.functional.pad(digits, (0, -digits.shape[1] % 4)).chunk(4, dim=1)
    for quarter, shift in zip(others, SHIFTS[1:], strict=True):
        first = first | quarter << shift
    return first


def _unpack(packed: Tensor, k: int) -> Tensor:
    """The codes, int8 [N, K]."""
    digits = torch.cat([(packed >> shift) & 3 for shift in SHIFTS], dim=1)[:, :k]
    return digits.view(torch.int8) - 1


def row_bytes(layer: BitLinear) -> int:
    """Of a row in `to_rows`."""
    return -(-layer.in_features // 4) + 2 * layer.scales.shape[1]


def to_rows(ternary: Ternary, layer: BitLinear) -> Tensor:
    """uint8 [N, row_bytes]: codes and scales of each row together, so that rows can be sent apart."""
    scales = ternary.scales.half().expand(layer.scales.shape).contiguous()
    return torch.cat((_pack(ternary.codes), scales.view(torch.uint8)), dim=1)


def from_rows(rows: Tensor, layer: BitLinear) -> Ternary:
    """Of all rows. One scale of a whole matrix comes back as one per row, as the layer holds it."""
    split = -(-layer.in_features // 4)
    scales = rows[:, split:].contiguous().view(torch.float16).float()
    granularity = "row" if layer.quant.scale == "tensor" else layer.quant.scale
    return Ternary(_unpack(rows[:, :split], layer.in_features), scales, granularity)


def from_bytes(data: Tensor, layer: BitLinear) -> Ternary:
    """The codes and scales of a layer, int8 [N, K] and float32."""
    n, k = layer.weight.shape
    split = -(-n * k // 4)
    codes = _unpack(data[:split].view(1, -1), n * k).view(n, k)
    scales = data[split:].clone().view(torch.float16).float()  # a copy: the bytes may begin at an odd place
    return Ternary(codes, scales.view(_scales_shape(layer)), layer.quant.scale)
