"""NVFP4: activations in four bits, as tensor cores of compute capability 10 and 12 multiply them (arXiv:2509.25149).

A number is an e2m1 code (±0, ½, 1, 1½, 2, 3, 4, 6), times an e4m3 scale per block of 16 inputs, times a float32 scale,
here one per token. A token's bytes are one row: two codes to a byte, the first in the low bits, then the block scales;
9 / 16 byte per input. Ternary weights are exact: codes 0x0, 0x2 and 0xA, whose block scales are all 1 and not kept.

How a token x is rounded, every step in float32 and to nearest, ties to even:

    scale = max(largest |x|, 2⁻¹⁰⁰) · (1 / 2688)      2688 = 6 · 448, the largest code times the largest block scale
    z     = x / scale
    block = max(e4m3(largest |z| of the block · (1 / 6)), 2⁻⁹)      2⁻⁹ is the smallest e4m3 number above 0
    code  = the e2m1 number nearest to z / block, ±6 beyond, with the sign of x

The last step compares z with exact multiples of the block scale, so that no quotient is rounded before it. A block
scale rounded down clips what is beyond 6, by at most 1 / 16 of it; by up to a third in blocks below 2⁻¹⁴ of the token's
largest value. A token with an infinity or NaN has a scale that is not finite, and every product of it is NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 16
INVERSE_CODE = 1.0 / 6.0
INVERSE_LARGEST = 1.0 / (6.0 * 448.0)
MIN_ABSMAX = 2.0**-100
MIN_BLOCK_SCALE = 2.0**-9
E4M3 = torch.float8_e4m3fn
MAJORS = (10, 12)
"""Of the compute capabilities whose tensor cores multiply it, and for which our kernel is compiled in the tests."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by the three low bits of a code; bit 3 is the sign."""
MIDDLES = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))
"""Between neighbours, and whether a tie goes up, to the even code."""


class Nvfp4Activations(NamedTuple):
    """x ≈ e2m1 · block scale · scale. packed: uint8 [..., 9 K / 16]; scale: float32 [..., 1]."""

    packed: Tensor
    scale: Tensor


def nvfp4_quantize(x: Tensor) -> Nvfp4Activations:
    """Tokens x, float [..., K], in NVFP4. Raises ValueError if K is not a multiple of 16."""
    width = x.shape[-1]
    if width % BLOCK:
        raise ValueError(f"{width} inputs cannot be split into NVFP4 blocks of {BLOCK}")
    x = x.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ABSMAX) * INVERSE_LARGEST
    z = (x / scale).abs().unflatten(-1, (width // BLOCK, BLOCK))
    block = (z.amax(dim=-1) * INVERSE_CODE).to(E4M3).to(torch.float32).clamp(min=MIN_BLOCK_SCALE)
    codes = torch.zeros_like(z, dtype=torch.uint8)
    for middle, up in MIDDLES:
        border = middle * block.unsqueeze(-1)
        codes += z >= border if up else z > border
    codes = codes.flatten(-2) | torch.signbit(x).to(torch.uint8) << 3
    return Nvfp4Activations(torch.cat([_pack(codes), block.to(E4M3).view(torch.uint8)], dim=-1), scale)


def nvfp4_values(packed: Tensor) -> Tensor:
    """e2m1 · block scale of rows, float32 [..., K], which bfloat16 and float16 hold exactly too."""
    inputs = packed.shape[-1] * BLOCK // (BLOCK // 2 + 1)
    codes, block = packed[..., : inputs // 2], packed[..., inputs // 2 :].contiguous().view(E4M3).to(torch.float32)
    return (e2m1_values(codes).unflatten(-1, (inputs // BLOCK, BLOCK)) * block.unsqueeze(-1)).flatten(-2)


def e2m1_values(codes: Tensor) -> Tensor:
    """uint8 [..., K / 2] to float32 [..., K]."""
    table = torch.tensor([*VALUES, *(-value for value in VALUES)], device=codes.device)
    return table[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).int()]


def nvfp4_ternary(codes: Tensor) -> Tensor:
    """Weights of -1, 0 and 1, [N, K] of any dtype, as e2m1: uint8 [N, K / 2]. K must be even."""
    codes = codes.to(torch.int8)
    return _pack((codes & 8 | (codes & 1) << 1).to(torch.uint8))  # the sign, and a 1


def nvfp4_matmul(
    packed: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = (float32(Σ e2m1 · block · w) · scale) · w_scale: [M, N] of out_dtype.

    packed: uint8 [M, 9 K / 16]; scale: float32 [M, 1]; weight: uint8 [N, K / 2]; w_scale: float32 [N, 1] or [1, 1].
    The sum is exact: terms are multiples of 2⁻¹⁰ up to 2688, of which float64 holds any sum of 2³¹.
    """
    total = nvfp4_values(packed).to(torch.float64) @ e2m1_values(weight).to(torch.float64).T
    return ((total.to(torch.float32) * scale) * w_scale.reshape(1, -1)).to(out_dtype)


def _pack(codes: Tensor) -> Tensor:
    """uint8 [..., K] of four bits to [..., K / 2]."""
    return codes[..., ::2] | codes[..., 1::2] << 4
