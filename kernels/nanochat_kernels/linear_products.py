"""The products of a ternary linear layer in training: forward, and the gradients of its input and its weight.

    y  = (codes · weight_codesᵀ · a_scale) · w_scale
    dx = dy · (weight_codes · w_scale)
    dw = dyᵀ · (codes · a_scale)

Plain functions of tensors; `bit_linear` and `feedforward` decide which rows, and whose gradient it is.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.operations import ternary_matmul
from nanochat_kernels.reference.activations import QuantizedActivations, group_sums
from nanochat_kernels.reference.packed import PackedTernary

FP8 = torch.float8_e4m3fn


class LinearWeight(NamedTuple):
    """A quantised weight in the forms that training multiplies with.

    operand: float32 [N, K]; w_scale: float32 [N] or None: with one scale per row, codes and their scale; with groups,
    codes · scale and None. packed (form `int8`): uint8 [N, K / 4] and scales float32 [N, G]; else None.
    """

    operand: Tensor
    w_scale: Tensor | None
    packed: Tensor | None = None
    scales: Tensor | None = None


def linear_product(codes: Tensor, scale: Tensor | None, weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    """y [..., N] in dtype; codes [..., K], which are int8 for the packed product; scale [..., 1]."""
    if codes.dtype == torch.int8 and weight.packed is not None and weight.scales is not None and scale is not None:
        return _packed_product(codes, scale, weight.packed, weight.scales, dtype)
    y = torch.nn.functional.linear(codes.to(dtype), weight.operand.to(dtype)).to(torch.float32)
    for factor in (scale, weight.w_scale):
        if factor is not None:
            y.mul_(factor)  # in place: y is ours
    return y.to(dtype)


def input_gradient(
    dys: Sequence[Tensor], operands: Sequence[Tensor], w_scales: Sequence[Tensor | None], dtype: torch.dtype, fp8: bool
) -> Tensor:
    """dx [M, K], the sum over the layers that read x; dys [M, N_i], operands [N_i, K], w_scales [N_i] or None.

    fp8: by `fp8_product`, for layers with one scale per row.
    """
    dx = None
    for dy, operand, w_scale in zip(dys, operands, w_scales, strict=True):
        if fp8 and w_scale is not None:
            part = fp8_product(dy * w_scale, operand)
            dx = part if dx is None else dx + part
            continue
        if w_scale is not None:  # scale the smaller of the two
            if dy.shape[0] > operand.shape[1]:
                operand = operand * w_scale.unsqueeze(1)
            else:
                dy = dy * w_scale
        dy, operand = dy.to(dtype), operand.to(dtype)
        dx = dy @ operand if dx is None else torch.addmm(dx, dy, operand, out=dx)
    assert dx is not None, "no layer"
    return dx


def weight_gradients(dys: Sequence[Tensor], codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """dw [N_i, K] of every layer that read the codes [M, K] with their scale [M, 1]; dys [M, N_i]."""
    if scale is not None and (codes.dtype == torch.int8 or codes.shape[1] <= sum(dy.shape[1] for dy in dys)):
        codes, scale = codes * scale, None
    codes = codes.to(dtype)
    return [(dy if scale is None else dy * scale).to(dtype).T @ codes for dy in dys]


def fp8_product(dy: Tensor, weight_codes: Tensor) -> Tensor:
    """dy · W in bfloat16, dy [M, N] rounded to float8_e4m3fn with a scale per row, W [N, K] in {-1, 0, 1}, exact.

    N and K must be multiples of 16. Tensor cores of compute capability 8.9 and later do it in hardware.
    """
    scale = dy.abs().amax(dim=1, keepdim=True).to(torch.float32).clamp(min=1e-30) / torch.finfo(FP8).max
    columns = torch.ones(1, weight_codes.shape[1], device=dy.device)
    weight = weight_codes.to(FP8).T.contiguous().T  # the second operand must be column-major
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - public only from torch 2.13 on
    return product((dy / scale).to(FP8), weight, scale, columns, out_dtype=torch.bfloat16)


@torch.library.custom_op("nanochat::packed_product", mutates_args=())
def _packed_product(codes: Tensor, scale: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`operations.ternary_matmul` as one node of a compiled graph: codes int8 [..., K] to [..., N]."""
    weight = PackedTernary(packed, scales, packed.shape[1] * 4)
    return ternary_matmul(QuantizedActivations(codes, scale, group_sums(codes, weight.group)), weight, dtype)


@_packed_product.register_fake
def _(codes: Tensor, scale: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], packed.shape[0], dtype=dtype)
