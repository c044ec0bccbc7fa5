"""NVFP4 written from its definition (OCP Microscaling v1.0, arXiv:2509.25149), in float64 and one value at a time.

e2m1: sign, two bits of exponent with bias 1, one of mantissa. e4m3: four and three, bias 7, no infinity, 0x7F is NaN.
An exponent of 0 means no implicit one. Rounding is to the nearest number, of two as near to the one with an even code.
"""

import math

import torch
from torch import Tensor


def decode(bits: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a code without its sign."""
    exponent, mantissa = bits >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    assert exponent < 1 << exponent_bits
    if exponent == 0:
        return math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


E2M1 = torch.tensor([decode(code, 2, 1, 1) for code in range(8)], dtype=torch.float64)
E4M3 = torch.tensor([decode(code, 4, 3, 7) for code in range(127)], dtype=torch.float64)


def nearest(values: Tensor, numbers: Tensor) -> Tensor:
    """Code of the nearest number to each value ≥ 0, the largest beyond; float64."""
    distance = (values.unsqueeze(-1) - numbers).abs()
    odd = torch.arange(len(numbers)) % 2
    least = distance.amin(-1, keepdim=True)
    return torch.where(distance == least, odd, 2).argmin(-1)


def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [M, K] with signs, bytes of block scales [M, K / 16], token scales float32 [M]; x finite float32 [M, K].

    The scale of a token and x / scale are rounded to float32, as the definition says; the rest is exact.
    """
    scale = (x.abs().amax(1).clamp(min=2.0**-100) * torch.tensor(1 / 2688, dtype=torch.float32)).to(torch.float32)
    z = (x / scale.unsqueeze(1)).to(torch.float64).unflatten(1, (-1, 16)).abs()
    sixth = (z.amax(2).to(torch.float32) * torch.tensor(1 / 6, dtype=torch.float32)).to(torch.float64)
    blocks = nearest(sixth, E4M3).clamp(min=1)
    codes = nearest((z / E4M3[blocks].unsqueeze(2)).clamp(max=6), E2M1).flatten(1)
    return codes + 8 * torch.signbit(x), blocks, scale


def values(codes: Tensor, blocks: Tensor) -> Tensor:
    """e2m1 · block scale, float64 [M, K]."""
    signed = E2M1[codes % 8] * (1 - 2 * (codes // 8))
    return signed * E4M3[blocks].repeat_interleave(16, dim=1)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and bytes of block scales of rows as the library keeps them, uint8 [M, 9 K / 16]."""
    half = packed.shape[1] * 8 // 9
    pairs = packed[:, :half].long()
    return torch.stack([pairs % 16, pairs // 16], dim=2).flatten(1), packed[:, half:].long()
