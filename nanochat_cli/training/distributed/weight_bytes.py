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
    digits = (ternary.codes.view(-1) + 1).view(torch.uint8)
    planes = nn.functional.pad(digits, (0, -len(digits) % 4)).view(4, -1)
    packed = planes[0]
    for plane, shift in zip(planes[1:], SHIFTS[1:], strict=True):
        packed = packed | plane << shift
    return torch.cat((packed, ternary.scales.half().view(-1).view(torch.uint8)))


def from_bytes(data: Tensor, layer: BitLinear) -> Ternary:
    """The codes and scales of a layer, int8 [N, K] and float32."""
    n, k = layer.weight.shape
    split = -(-n * k // 4)
    digits = torch.stack([(data[:split] >> shift) & 3 for shift in SHIFTS]).view(-1)[: n * k]
    scales = data[split:].clone().view(torch.float16).float()  # a copy: the bytes may begin at an odd place
    return Ternary(digits.view(torch.int8).sub_(1).view(n, k), scales.view(_scales_shape(layer)), layer.quant.scale)
