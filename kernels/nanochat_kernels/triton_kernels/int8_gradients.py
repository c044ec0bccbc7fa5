"""Both gradients of linear layers that read one input, by integer products of K-major operands.

    dx = codes of dy by row [M, N] · W [N, K],  dw = columns of dy [N, M] · codes of x [M, K]

Tensor cores take int8 only with the summed dimension innermost in both operands. So dy leaves its quantiser in both
orders, the codes of x are transposed once for all layers, and W is where it was transposed ahead (a view of [K, N]).
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from nanochat_kernels.triton_kernels.configurations import MULTIPROCESSORS, WEIGHT_GRADIENT, architecture
from nanochat_kernels.triton_kernels.int8_matmul import int8_matmul
from nanochat_kernels.triton_kernels.launch import cdiv, require_device
from nanochat_kernels.triton_kernels.quantize_gradient import GradientCodes, quantize_gradient, transpose


def int8_gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor,
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    dtype: torch.dtype,
    wants: tuple[bool, bool] = (True, True),
) -> tuple[list[Tensor], list[Tensor]]:
    """`reference.gradient.int8_gradients`."""
    require_device(codes, *dys)
    dxs, dws = [], []
    inputs = transpose(codes) if wants[1] else None
    for dy, operand, w_scale in zip(dys, operands, w_scales, strict=True):
        gradient = quantize_gradient(dy, w_scale, scale)
        if wants[0]:
            weight = operand.T if operand.stride(0) == 1 else transpose(operand)[:, : len(operand)]
            dxs.append(int8_matmul(gradient.codes, weight, gradient.scale, _one(dy.device), dtype))
        if inputs is not None:
            dws.append(_weight_gradient(gradient, inputs))
    return dxs, dws


def _weight_gradient(gradient: GradientCodes, inputs: Tensor) -> Tensor:
    """float32 [N, K]; inputs: int8 [K, M']. Programs share the tokens until there are two per multiprocessor."""
    known = architecture(require_device(inputs))
    tile = WEIGHT_GRADIENT[known]
    tiles = cdiv(len(gradient.columns), tile.block_m) * cdiv(len(inputs), tile.block_n)
    splits = max(2 * MULTIPROCESSORS[known] // tiles, 1)
    one = _one(inputs.device)
    return int8_matmul(gradient.columns, inputs, gradient.column_scale, one, torch.float32, tile, splits)


@cache
def _one(device: torch.device) -> Tensor:
    return torch.ones(1, device=device)
