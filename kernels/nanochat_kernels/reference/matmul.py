"""Products of int8 activations with int8 or packed ternary weights: the definitions.

The integer part is exact; the float part is one expression, the same in every backend:

    row or tensor scales    y = (float(Σ_k a·w) · a_scale) · w_scale
    group scales            y = (Σ_g w_scale_g · float(Σ_{k in g} a·w)) · a_scale     (the order over g is free)
"""

import torch
from torch import Tensor

from nanochat_kernels.reference.activations import QuantizedActivations, quantize_activations
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.packing import unpack_plane128


def int8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """y = (float(a · bᵀ) · a_scale) · b_scale.

    a: int8 [M, K]; b: int8 [N, K]; a_scale: float32 [M, 1]; b_scale: float32 [N, 1] or [1, 1]. Returns [M, N].
    """
    return _scaled(integer_product(a, b), a_scale, b_scale).to(out_dtype)


def _scaled(product: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    return (product.to(torch.float32) * a_scale) * b_scale.reshape(1, -1)


def integer_product(a: Tensor, b: Tensor, largest: int = 128) -> Tensor:
    """Exact a · bᵀ: int8 [M, K] and int8 [N, K] to int32 [M, N]; |b| ≤ largest.

    Computed in floats, which hold every partial sum exactly: float32 below 2²⁴, float64 beyond.
    """
    dtype = torch.float32 if 128 * largest * a.shape[-1] <= 2**24 else torch.float64
    return (a.to(dtype) @ b.to(dtype).T).to(torch.int32)


def ternary_matmul(
    activations: QuantizedActivations, weight: PackedTernary, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The product with packed weights: codes [..., K] to [..., N] of out_dtype. Needs no sums."""
    codes, scale, _ = activations
    rows = codes.reshape(-1, weight.columns)
    a_scale = scale.reshape(-1, 1)
    unpacked = unpack_plane128(weight.packed, weight.columns)
    if weight.n_groups == 1:
        y = _scaled(integer_product(rows, unpacked, 1), a_scale, weight.scales)
    else:
        y = torch.zeros(len(rows), weight.rows, device=rows.device)
        group = weight.columns // weight.n_groups
        for g in range(weight.n_groups):
            inputs = slice(g * group, (g + 1) * group)
            y += integer_product(rows[:, inputs], unpacked[:, inputs], 1).to(torch.float32) * weight.scales[:, g]
        y = y * a_scale
    return y.to(out_dtype).reshape(*codes.shape[:-1], weight.rows)


def packed_linear(x: Tensor, weight: PackedTernary, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """`ternary_matmul` of `quantize_activations(x)`: float [..., K] to [..., N]."""
    return ternary_matmul(quantize_activations(x, weight.group), weight, out_dtype)


def unpack(weight: PackedTernary, dtype: torch.dtype = torch.int8) -> Tensor:
    """The codes -1, 0, 1 without their scales: [N, K] of int8, bfloat16, float32, float8_e4m3fn (all exact)."""
    return unpack_plane128(weight.packed, weight.columns).to(dtype)


def fp8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """`int8_matmul` for float8_e4m3fn operands: float32 sums of exact products. For GPUs without int8 tensor cores."""
    return ((a.to(torch.float32) @ b.to(torch.float32).T * a_scale) * b_scale.reshape(1, -1)).to(out_dtype)
