"""The gradient of a layer's output to int8 by row and by column, as tensor cores want it: both K-major.

dy is read twice, once for the maxima and once for the codes, which leave as rows [M, N] for the gradient of the input
and as columns [N, M] for that of the weight. Equal to `reference.gradient.quantize_gradient` bit for bit.

Maxima are those of magnitudes as integers: the order of the bits of positive floats is that of their values, NaN is the
largest, and integers have an atomic maximum, whose result is the same in any order.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.activations import LEVELS
from nanochat_kernels.reference.gradient import MIN_ABSMAX
from nanochat_kernels.triton_kernels.launch import Launch, cdiv, launch, require_device

ROWS = 128
"""Of a tile of codes, and so what the columns' length is a multiple of: products need no mask."""
TILE = {"ROWS": ROWS, "COLUMNS": 64}
MAXIMA_TILE = {"ROWS": 64, "COLUMNS": 128}
MIN_BITS: int = struct.unpack("i", struct.pack("f", MIN_ABSMAX))[0]


class GradientCodes(NamedTuple):
    """codes: int8 [M, N]; columns: int8 [N, M'], M' the next multiple of ROWS, zeros from M on; scales [M] and [N]."""

    codes: Tensor
    scale: Tensor
    columns: Tensor
    column_scale: Tensor


@triton.jit
def gradient_maxima_kernel(
    dy_ptr,  # [M, N], rows dy_stride apart
    factor_ptr,  # float32 [N], factor_stride (1, or 0 for one) apart
    weight_ptr,  # float32 [M]
    maxima_ptr,  # int32 [M + N], of rows, then of columns: floats by their bits
    M,
    N,
    dy_stride,
    factor_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (m < M)[:, None] & (n < N)[None, :]
    dy = tl.load(dy_ptr + m.to(tl.int64)[:, None] * dy_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + n * factor_stride, mask=n < N, other=0.0)
    weight = tl.load(weight_ptr + m, mask=m < M, other=0.0)
    by_row = (dy * factor[None, :]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    by_column = (dy * weight[:, None]).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(maxima_ptr + m, tl.max(by_row, axis=1), mask=m < M, sem="relaxed")
    tl.atomic_max(maxima_ptr + M + n, tl.max(by_column, axis=0), mask=n < N, sem="relaxed")


@triton.jit
def gradient_codes_kernel(
    dy_ptr,
    factor_ptr,
    weight_ptr,
    maxima_ptr,  # the same, as float32
    codes_ptr,  # int8 [M, N]
    scale_ptr,  # float32 [M]
    columns_ptr,  # int8 [N, length]
    column_scale_ptr,  # float32 [N]
    M,
    N,
    length,  # M, filled up to a multiple of ROWS
    dy_stride,
    factor_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LEVELS: tl.constexpr,
    INVERSE_LEVELS: tl.constexpr,
    COLUMN_LEVELS: tl.constexpr,
    INVERSE_COLUMN_LEVELS: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (m < M)[:, None] & (n < N)[None, :]
    index = m.to(tl.int64)[:, None]
    dy = tl.load(dy_ptr + index * dy_stride + n[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + n * factor_stride, mask=n < N, other=0.0)
    weight = tl.load(weight_ptr + m, mask=m < M, other=0.0)
    row_top = tl.load(maxima_ptr + m, mask=m < M, other=1.0)
    column_top = tl.load(maxima_ptr + M + n, mask=n < N, other=1.0)
    step = tl.div_rn(LEVELS + tl.zeros_like(row_top), row_top)
    by_row = _codes(dy * factor[None, :], step[:, None], LEVELS)
    tl.store(codes_ptr + index * N + n[None, :], by_row, mask=mask)
    step = tl.div_rn(COLUMN_LEVELS + tl.zeros_like(column_top), column_top)
    by_column = _codes(dy * weight[:, None], step[None, :], COLUMN_LEVELS)
    at = n.to(tl.int64)[:, None] * length + m[None, :]
    tl.store(columns_ptr + at, tl.trans(by_column), mask=(n < N)[:, None])
    if tl.program_id(1) == 0:
        tl.store(scale_ptr + m, row_top * INVERSE_LEVELS, mask=m < M)
    if tl.program_id(0) == 0:
        tl.store(column_scale_ptr + n, column_top * INVERSE_COLUMN_LEVELS, mask=n < N)


@triton.jit
def _codes(x, factor, LEVELS: tl.constexpr):
    """int8 of x · factor, to nearest, half to even; no magnitude of it rounds to more than LEVELS.

    1.5 · 2²³ has spacing 1, so that the sum's last byte is the code. The bound changes no code; it keeps the product
    from being fused with the addition.
    """
    return (tl.minimum(x * factor, LEVELS) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def transpose_kernel(
    x_ptr,  # int8 [M, K], rows x_stride apart
    y_ptr,  # int8 [K, length], zeros from M on
    M,
    K,
    length,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (m < M)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0)
    tl.store(y_ptr + k.to(tl.int64)[:, None] * length + m[None, :], tl.trans(x), mask=(k < K)[:, None])


def quantize_gradient(dy: Tensor, factor: Tensor, weight: Tensor, levels: float = LEVELS) -> GradientCodes:
    """dy: float [M, N]; factor: float32 [N] or [1]; weight: float32 [M]; as in the reference."""
    require_device(dy, factor, weight)
    if dy.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"gradients of {dy.dtype}")
    dy = dy if dy.stride(1) == 1 else dy.contiguous()
    (m, n), length, device = dy.shape, _filled(dy.shape[0]), dy.device
    out = GradientCodes(
        torch.empty((m, n), dtype=torch.int8, device=device),
        torch.empty(m, device=device),
        torch.empty((n, length), dtype=torch.int8, device=device),
        torch.empty(n, device=device),
    )
    maxima = torch.full((m + n,), MIN_BITS, dtype=torch.int32, device=device)
    read = {
        "dy_ptr": dy,
        "factor_ptr": factor.to(torch.float32).contiguous(),
        "weight_ptr": weight.to(torch.float32).contiguous(),
        "maxima_ptr": maxima,
        "M": m,
        "N": n,
        "dy_stride": dy.stride(0),
        "factor_stride": int(factor.numel() > 1),
    }
    written = {f"{name}_ptr": tensor for name, tensor in out._asdict().items()}
    grid = cdiv(m, MAXIMA_TILE["ROWS"]), cdiv(n, MAXIMA_TILE["COLUMNS"])
    launch(Launch(gradient_maxima_kernel, grid, read, MAXIMA_TILE))
    constants = {
        **TILE,
        "LEVELS": LEVELS,
        "INVERSE_LEVELS": 1.0 / LEVELS,
        "COLUMN_LEVELS": levels,
        "INVERSE_COLUMN_LEVELS": 1.0 / levels,
    }
    arguments = {**read, **written, "maxima_ptr": maxima.view(torch.float32), "length": length}
    grid = length // ROWS, cdiv(n, TILE["COLUMNS"])
    launch(Launch(gradient_codes_kernel, grid, arguments, constants))
    return out


def transpose(x: Tensor) -> Tensor:
    """int8 [M, K] to [K, M'], M' the next multiple of ROWS, zeros from M on."""
    require_device(x)
    x = x if x.stride(1) == 1 else x.contiguous()
    (m, k), length = x.shape, _filled(x.shape[0])
    y = torch.empty((k, length), dtype=torch.int8, device=x.device)
    arguments = {"x_ptr": x, "y_ptr": y, "M": m, "K": k, "length": length, "x_stride": x.stride(0)}
    grid = length // ROWS, cdiv(k, TILE["COLUMNS"])
    launch(Launch(transpose_kernel, grid, arguments, TILE))
    return y


def _filled(rows: int) -> int:
    """At least one tile, which writes the scales of columns."""
    return max(cdiv(rows, ROWS), 1) * ROWS
