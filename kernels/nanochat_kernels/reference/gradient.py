"""The gradient of a layer's output in int8, for the two products of its backward pass.

Only this gradient is rounded: the other operand of each product, ternary codes or int8 activations, is exact in int8.
Rounding is to nearest, half to even.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.reference.activations import INVERSE_LEVELS, LEVELS
from nanochat_kernels.reference.matmul import integer_product

MIN_ABSMAX = 1e-30


class QuantizedGradient(NamedTuple):
    """dy · factor ≈ codes · scale by row, for the gradient of the input; dy · weight ≈ column_codes · column_scale.

    codes, column_codes: int8 [M, N]; scale: float32 [M]; column_scale: float32 [N], for the gradient of the weight.
    """

    codes: Tensor
    scale: Tensor
    column_codes: Tensor
    column_scale: Tensor


def quantize_gradient(dy: Tensor, factor: Tensor, weight: Tensor, levels: float = LEVELS) -> QuantizedGradient:
    """dy: float [M, N]; factor: float32 [N], scales of the weight's rows; weight: float32 [M], those of activations.

    levels: the largest code by column. Where dy is not finite, so are the scales.
    """
    dy = dy.to(torch.float32)
    by_row, by_column = dy * factor, dy * weight.unsqueeze(1)
    rows, columns = (_absmax(x, dim) for x, dim in ((by_row, 1), (by_column, 0)))
    # Quotients of tensors: a number over a tensor would be its reciprocal times the number, rounded twice.
    by_row, by_column = (
        x * (torch.full_like(m, top) / m) for x, m, top in ((by_row, rows, LEVELS), (by_column, columns, levels))
    )
    column_scale = columns.squeeze(0) * torch.tensor(1.0 / levels, dtype=torch.float32)
    return QuantizedGradient(
        *(by_row.round().to(torch.int8), rows.squeeze(1) * INVERSE_LEVELS),
        *(by_column.round().to(torch.int8), column_scale),
    )


def int8_gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor,
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    dtype: torch.dtype,
    wants: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], list[Tensor]]:
    """Of layers that read one input: each one's part of dx, [M, K] in dtype, and dw, float32 [N_i, K], each if wanted.

    dys: float [M, N_i]; codes: int8 [M, K] and their scale float32 [M]; operands: int8 [N_i, K], in {-1, 0, 1}, and
    their scales float32 [N_i] or [1].
    """
    dxs, dws = [], []
    for dy, operand, w_scale in zip(dys, operands, w_scales, strict=True):
        rounded = quantize_gradient(dy, w_scale, scale)
        if wants[0]:
            product = integer_product(rounded.codes, operand.T).to(torch.float32)
            dxs.append((product * rounded.scale.unsqueeze(1)).to(dtype))
        if wants[1]:
            product = integer_product(rounded.column_codes.T, codes.T).to(torch.float32)
            dws.append(product * rounded.column_scale.unsqueeze(1))
    return dxs, dws


def _absmax(x: Tensor, dim: int) -> Tensor:
    return x.abs().amax(dim=dim, keepdim=True).clamp(min=MIN_ABSMAX)
