"""Tensor-core products of two K-major matrices with a scale per row of each: int8, its fp8 twin, and float16.

One kernel for all three, y = (float(a · bᵀ) · a_scale) · b_scale: int8 operands add in int32 and are exact; fp8 and
float16 add in float32. Float16 serves ternary weights with group scales: codes times float16-exact scales are exact
float16 numbers, so only the order of the float32 sum differs from the reference.

Products of many inputs and few outputs make few programs, so the inputs may be split: partial sums then go through
memory, and a second kernel adds them. Those of int8 are integers, so that the split changes nothing.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.triton_kernels.configurations import MatmulConfiguration, matmul_configuration
from nanochat_kernels.triton_kernels.launch import Launch, cdiv, launch, require_device

OUTPUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP8_CAPABILITY = 89
OUTPUTS = 512
"""Sums of one program that adds those of the splits."""


@triton.jit
def scaled_matmul_kernel(
    a_ptr,  # [M, K]
    b_ptr,  # [N, K]
    a_scale_ptr,  # float32, a_scale_stride (1, or 0 for one scale) apart
    b_scale_ptr,
    y_ptr,  # [M, N], contiguous; with SPLIT: int32 partial sums [splits, M, N]
    M,
    N,
    K,
    steps,  # blocks of K of one program
    a_stride,
    b_stride,
    a_scale_stride,
    b_scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,  # tiles along M that are neighbours in time, so that they share columns of b in the L2
    EVEN_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    band = program // (SWIZZLE * tiles_n)
    band_rows = tl.minimum(tiles_m - band * SWIZZLE, SWIZZLE)
    row_tile = band * SWIZZLE + (program % (SWIZZLE * tiles_n)) % band_rows
    column_tile = (program % (SWIZZLE * tiles_n)) // band_rows
    m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the edge read the last row again, which needs no mask; they are not stored.
    a = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_stride + k[None, :]
    b = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[None, :] * b_stride + k[:, None]
    INTEGER: tl.constexpr = a_ptr.dtype.element_ty == tl.int8
    ACCUMULATOR: tl.constexpr = tl.int32 if INTEGER else tl.float32
    total = tl.zeros((BLOCK_M, BLOCK_N), ACCUMULATOR)
    first = 0
    last = tl.cdiv(K, BLOCK_K)
    if SPLIT:
        first = tl.program_id(1) * steps
        last = tl.minimum(first + steps, last)
        a += first * BLOCK_K
        b += first * BLOCK_K
    for block in range(first, last):
        if EVEN_K:
            a_tile = tl.load(a)
            b_tile = tl.load(b)
        else:
            left = K - block * BLOCK_K
            a_tile = tl.load(a, mask=(k < left)[None, :], other=0.0)
            b_tile = tl.load(b, mask=(k < left)[:, None], other=0.0)
        if INTEGER:
            total = tl.dot(a_tile, b_tile, acc=total, out_dtype=tl.int32)
        else:
            # Hopper's fp8 tensor cores add with fewer bits than float32: move to a true float32 sum every 128 products.
            total = tl.dot(a_tile, b_tile, acc=total, max_num_imprecise_acc=128)
        a += BLOCK_K
        b += BLOCK_K
    index = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    if SPLIT:
        tl.store(y_ptr + tl.program_id(1).to(tl.int64) * M * N + index, total, mask=mask)
    else:
        a_scale = tl.load(a_scale_ptr + m * a_scale_stride, mask=m < M, other=0.0)
        b_scale = tl.load(b_scale_ptr + n * b_scale_stride, mask=n < N, other=0.0)
        y = (total.to(tl.float32) * a_scale[:, None]) * b_scale[None, :]
        tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_splits_kernel(
    partials_ptr,  # int32 [splits, M, N]
    a_scale_ptr,
    b_scale_ptr,
    y_ptr,  # [M, N]
    M,
    N,
    splits,
    a_scale_stride,
    b_scale_stride,
    OUTPUTS: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < N
    at = partials_ptr + m * N + n
    total = tl.zeros((OUTPUTS,), tl.int32)
    for _ in range(splits):
        total += tl.load(at, mask=mask, other=0)
        at += tl.cast(M, tl.int64) * N  # M may be a constant, which has no method to()
    a_scale = tl.load(a_scale_ptr + m * a_scale_stride)
    b_scale = tl.load(b_scale_ptr + n * b_scale_stride, mask=mask, other=0.0)
    y = (total.to(tl.float32) * a_scale) * b_scale
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    configuration: MatmulConfiguration | None = None,
    splits: int = 1,
) -> Tensor:
    """`reference.matmul.int8_matmul`: int8 [M, K] and [N, K], float32 scales [M, 1] and [N, 1] or [1, 1].

    splits: programs that share the inputs of a tile.
    """
    return scaled_matmul(a, b, a_scale, b_scale, out_dtype, torch.int8, configuration, splits)


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    configuration: MatmulConfiguration | None = None,
) -> Tensor:
    """`reference.matmul.fp8_matmul`: float8_e4m3fn [M, K] and [N, K]. Unsupported below capability 8.9."""
    if (capability := require_device(a, b)) < FP8_CAPABILITY:
        raise Unsupported(f"compute capability {capability / 10} has no fp8")
    return scaled_matmul(a, b, a_scale, b_scale, out_dtype, torch.float8_e4m3fn, configuration)


def scaled_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype,
    dtype: torch.dtype,
    configuration: MatmulConfiguration | None = None,
    splits: int = 1,
) -> Tensor:
    """y = (float(a · bᵀ) · a_scale) · b_scale, [M, N] of out_dtype. a [M, K] and b [N, K], both of `dtype`.

    Scales: float32, one per row or a single one. splits: for int8. Raises ValueError if the shapes do not fit.
    """
    capability = require_device(a, b, a_scale, b_scale)
    (rows, columns), (outputs, other) = a.shape, b.shape
    if columns != other or a_scale.numel() not in (1, rows) or b_scale.numel() not in (1, outputs):
        raise ValueError(
            f"shapes do not fit: {list(a.shape)} · {list(b.shape)}ᵀ with scales {list(a_scale.shape)} and"
            f" {list(b_scale.shape)}"
        )
    if a.dtype != dtype or b.dtype != dtype:
        raise Unsupported(f"operands of {a.dtype} and {b.dtype} where {dtype} is expected")
    if out_dtype not in OUTPUT_DTYPES:
        raise Unsupported(f"output of {out_dtype}")
    configuration = configuration or matmul_configuration(capability, dtype, rows, outputs)
    a = a if a.stride(1) == 1 else a.contiguous()
    b = b if b.stride(1) == 1 else b.contiguous()
    blocks = cdiv(columns, configuration.block_k)
    steps = max(cdiv(blocks, splits), 1)
    splits = max(cdiv(blocks, steps), 1)
    y = torch.empty((rows, outputs), dtype=out_dtype, device=a.device)
    partials = y if splits == 1 else torch.empty((splits, rows, outputs), dtype=torch.int32, device=a.device)
    scales = {
        "a_scale_ptr": a_scale.to(torch.float32).contiguous(),
        "b_scale_ptr": b_scale.to(torch.float32).contiguous(),
        "M": rows,
        "N": outputs,
        "a_scale_stride": int(a_scale.numel() > 1),
        "b_scale_stride": int(b_scale.numel() > 1),
    }
    arguments = {
        "a_ptr": a,
        "b_ptr": b,
        "y_ptr": partials,
        "K": columns,
        "steps": steps,
        "a_stride": a.stride(0),
        "b_stride": b.stride(0),
        **scales,
    }
    constants = {
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": configuration.block_k,
        "SWIZZLE": configuration.swizzle,
        "EVEN_K": columns % configuration.block_k == 0,
        "SPLIT": splits > 1,
    }
    grid = (cdiv(rows, configuration.block_m) * cdiv(outputs, configuration.block_n), splits)
    weights = configuration.block_n * configuration.block_k
    launch(
        Launch(
            scaled_matmul_kernel,
            grid,
            arguments,
            constants,
            configuration.num_warps,
            configuration.num_stages,
            weights,
            weights * configuration.block_m,
        )
    )
    if splits > 1:
        arguments = {"partials_ptr": partials, "y_ptr": y, "splits": splits, **scales}
        grid = (rows, cdiv(outputs, OUTPUTS))
        launch(Launch(add_splits_kernel, grid, arguments, {"OUTPUTS": OUTPUTS}))
    return y
