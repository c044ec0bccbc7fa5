"""Absmean ternarisation of weights (BitNet b1.58, arXiv:2402.17764, eq. 1-3).

Knows one weight matrix. Leaves to its callers when to quantise (once per optimizer step) and where to keep
the result. The scale is rounded to float16 *before* it is used, so that an exported file, which
stores float16 scales, holds exactly the weights that were trained. The mean is summed in float64: its
float16 value then does not depend on the order of summation, and every backend gets the same scales.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["row", "tensor"] | int

MIN_SCALE = 1e-5
MAX_SCALE = 65504.0  # the largest float16


@dataclass(frozen=True)
class Ternary:
    """A ternary matrix.

    codes: int8 [N, K] in {-1, 0, 1}. scales: float32, every value exact in float16; [1, 1] for
    `tensor`, [N, 1] for `row`, [N, K / g] for groups of g consecutive inputs.
    """

    codes: Tensor
    scales: Tensor
    granularity: Granularity

    def element_scales(self) -> Tensor:
        """The scale of every element: float32 [N, K], a view if possible."""
        rows, columns = self.codes.shape
        groups = self.scales.shape[1]
        return (
            self.scales.expand(rows, groups)
            .unsqueeze(-1)
            .expand(rows, groups, columns // groups)
            .reshape(rows, columns)
        )

    def dequantize(self) -> Tensor:
        """The effective weight codes · scale: float32 [N, K]."""
        return self.codes.to(torch.float32) * self.element_scales()


def absmean_scales(weight: Tensor, granularity: Granularity) -> Tensor:
    """Mean magnitude per group, at least 1e-5, rounded to float16: float32 [1, 1], [N, 1] or [N, K / g]."""
    rows, columns = weight.shape
    if granularity == "tensor":
        means = weight.abs().mean(dtype=torch.float64).reshape(1, 1)
    elif granularity == "row":
        means = weight.abs().mean(dim=1, keepdim=True, dtype=torch.float64)
    else:
        group = int(granularity)
        if group <= 0 or columns % group:
            raise ValueError(f"a weight with {columns} inputs cannot be split into groups of {granularity}")
        means = weight.reshape(rows, columns // group, group).abs().mean(dim=2, dtype=torch.float64)
    return means.to(torch.float32).clamp(MIN_SCALE, MAX_SCALE).to(torch.float16).to(torch.float32)


def ternarize(weight: Tensor, granularity: Granularity = "row") -> Ternary:
    """Quantise a latent weight: codes = clamp(round(w / s), -1, 1), s = absmean_scales(w).

    weight: float32 [N, K]. Rounds half to even, so |w| = s / 2 becomes 0. Raises ValueError if K is
    not a multiple of the group. Makes no host sync.
    """
    weight = weight.detach().to(torch.float32)
    scales = absmean_scales(weight, granularity)
    codes = (_grouped(weight, scales) / scales.unsqueeze(-1)).round().clamp(-1, 1).to(torch.int8)
    return Ternary(codes.reshape(weight.shape), scales, granularity)


def fake_ternarize(weight: Tensor, granularity: Granularity = "row") -> Tensor:
    """`ternarize(weight).dequantize()` without the int8 intermediate: float32 [N, K], equal bit for bit."""
    weight = weight.detach().to(torch.float32)
    scales = absmean_scales(weight, granularity).unsqueeze(-1)
    grouped = _grouped(weight, scales.squeeze(-1))
    return ((grouped / scales).round().clamp(-1, 1) * scales).reshape(weight.shape)


def _grouped(weight: Tensor, scales: Tensor) -> Tensor:
    """[N, K] as [N, G, K / G] so that scales [N or 1, G] broadcast over the last dimension."""
    rows, columns = weight.shape
    return weight.reshape(rows, scales.shape[1], columns // scales.shape[1])
