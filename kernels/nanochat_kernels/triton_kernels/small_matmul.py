"""Small batches: packed ternary weights times 5 to 64 int8 tokens on tensor cores, yᵀ = W · aᵀ.

Operands are swapped: outputs are the long side of the tile and tokens the short one, which may be as small as 8. A
tile of bytes is unpacked in registers to four planes, and every plane is multiplied separately by the activations
that are 32 apart: nothing is shuffled. Codes stay biased; the sums of the activations correct the result.

Few outputs make few programs, so the inputs may be split: partial sums then go through memory and a second kernel adds
them in order. With one scale per row they are integers and the split changes nothing; with groups it changes the order
of a float32 sum, always in the same way.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.triton_kernels.configurations import SmallMatmulConfiguration, small_matmul_configuration
from nanochat_kernels.triton_kernels.gemv import require_group
from nanochat_kernels.triton_kernels.group_sums import sums_per_scale
from nanochat_kernels.triton_kernels.int8_matmul import OUTPUT_DTYPES
from nanochat_kernels.triton_kernels.language import unpack_planes
from nanochat_kernels.triton_kernels.launch import Launch, cdiv, inline_assembly, launch, require_device

BLOCK = 128
"""Inputs in 32 bytes."""


@triton.jit
def small_matmul_kernel(
    a_ptr,  # int8 [M, K]
    a_scale_ptr,  # float32 [M]
    a_sum_ptr,  # int32 [M, groups]
    w_ptr,  # uint8 [N, K / 4]
    w_scale_ptr,  # float32 [N, groups]
    y_ptr,  # [M, N]; with SPLIT: partial sums [splits, M, N], int32 or (groups) float32
    M,
    N,
    K,
    groups,
    steps,  # loop iterations of one program; steps · STEP inputs
    GROUP: tl.constexpr,  # inputs per scale; 0 for one scale per row
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCKS: tl.constexpr,  # blocks of 128 inputs per product; with groups of 64 or 128 it is 1
    SPLIT: tl.constexpr,
    ASM: tl.constexpr,
):
    STEP: tl.constexpr = GROUP if GROUP > 128 else 128 * BLOCKS  # a group is finished within an iteration
    PRODUCTS: tl.constexpr = STEP // (128 * BLOCKS)
    PARTS: tl.constexpr = 2 if GROUP == 64 else 1
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    j = tl.arange(0, 32 * BLOCKS)
    row = tl.minimum(n, N - 1).to(tl.int64)
    token = tl.minimum(m, M - 1).to(tl.int64)
    first = tl.program_id(2) * steps
    w = w_ptr + row[:, None] * (K // 4) + first * (STEP // 4) + j[None, :]
    a = a_ptr + token[None, :] * K + first * STEP + (j // 32 * 128 + j % 32)[:, None]
    w_scales = w_scale_ptr + row * groups
    a_sums = a_sum_ptr + token * groups
    total = tl.zeros((OUTPUTS, TOKENS), tl.float32 if GROUP > 0 else tl.int32)
    last = tl.minimum(first + steps, K // STEP)
    for step in range(first, last):
        dot = tl.zeros((OUTPUTS, TOKENS), tl.int32) if GROUP > 0 else total
        for product in tl.static_range(PRODUCTS):
            w0, w1, w2, w3 = unpack_planes(tl.load(w + product * (32 * BLOCKS)), ASM)
            at = a + product * (128 * BLOCKS)
            dot = tl.dot(w0, tl.load(at), acc=dot, out_dtype=tl.int32)
            dot = tl.dot(w1, tl.load(at + 32), acc=dot, out_dtype=tl.int32)
            if PARTS == 2:
                bias = tl.load(a_sums + step * 2)
                scale = tl.load(w_scales + step * 2)
                total += (dot - bias[None, :]).to(tl.float32) * scale[:, None]
                dot = tl.zeros((OUTPUTS, TOKENS), tl.int32)
            dot = tl.dot(w2, tl.load(at + 64), acc=dot, out_dtype=tl.int32)
            dot = tl.dot(w3, tl.load(at + 96), acc=dot, out_dtype=tl.int32)
        if GROUP > 0:
            group = step * PARTS + PARTS - 1
            bias = tl.load(a_sums + group)
            scale = tl.load(w_scales + group)
            total += (dot - bias[None, :]).to(tl.float32) * scale[:, None]
        else:
            total = dot
        w += STEP // 4
        a += STEP
    index = m.to(tl.int64)[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    if SPLIT:
        tl.store(y_ptr + tl.program_id(2).to(tl.int64) * M * N + index, total, mask=mask)
    else:
        a_scale = tl.load(a_scale_ptr + m, mask=m < M, other=0.0)[None, :]
        if GROUP > 0:
            y = total * a_scale
        else:
            bias = tl.load(a_sums)
            w_scale = tl.load(w_scales)
            y = ((total - bias[None, :]).to(tl.float32) * a_scale) * w_scale[:, None]
        tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_partials_kernel(
    partials_ptr,  # [splits, M, N]: int32, or float32 with group scales
    a_scale_ptr,
    a_sum_ptr,  # int32 [M]; unused with group scales, whose partials are corrected
    w_scale_ptr,  # float32 [N]; unused with group scales, whose partials are scaled
    y_ptr,  # [M, N]
    M,
    N,
    splits,
    GROUPED: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = n < N
    at = partials_ptr + m * N + n
    total = tl.load(at, mask=mask, other=0)
    for _ in range(1, splits):
        at += tl.cast(M, tl.int64) * N  # M may be a constant, which has no method to()
        total += tl.load(at, mask=mask, other=0)
    a_scale = tl.load(a_scale_ptr + m)
    if GROUPED:
        y = total * a_scale
    else:
        w_scale = tl.load(w_scale_ptr + n, mask=mask, other=0.0)
        y = ((total - tl.load(a_sum_ptr + m)).to(tl.float32) * a_scale) * w_scale
    tl.store(y_ptr + m * N + n, y.to(y_ptr.dtype.element_ty), mask=mask)


def ternary_small_matmul(
    activations: QuantizedActivations,
    weight: PackedTernary,
    out_dtype: torch.dtype = torch.float32,
    configuration: SmallMatmulConfiguration | None = None,
) -> Tensor:
    """`reference.matmul.ternary_matmul` for any number of tokens; meant for 5 to 64.

    Codes [..., K] to [..., N]. Scales per row, or per group of 64 or of a multiple of 128 inputs.
    """
    codes, scale, _ = activations
    capability = require_device(codes, weight.packed)
    if out_dtype not in OUTPUT_DTYPES:
        raise Unsupported(f"output of {out_dtype}")
    require_group(weight)
    outputs, columns, groups = weight.rows, weight.columns, weight.n_groups
    tokens = codes.numel() // columns
    group = weight.group if groups > 1 else 0
    configuration = configuration or small_matmul_configuration(capability, group, tokens, outputs, columns)
    blocks = _blocks(configuration.blocks, group, columns)
    step = max(group, BLOCK * blocks)
    steps = cdiv(columns // step, configuration.splits)
    splits = cdiv(columns // step, steps)
    y = torch.empty((*codes.shape[:-1], outputs), dtype=out_dtype, device=codes.device)
    partial_dtype = torch.float32 if group else torch.int32
    written = y if splits == 1 else torch.empty((splits, tokens, outputs), dtype=partial_dtype, device=codes.device)
    sums = sums_per_scale(activations, weight)
    scales = {"a_scale_ptr": scale.contiguous(), "a_sum_ptr": sums, "w_scale_ptr": weight.scales}
    arguments = {
        "a_ptr": codes.contiguous(),
        "w_ptr": weight.packed,
        "y_ptr": written,
        "M": tokens,
        "N": outputs,
        "K": columns,
        "groups": groups,
        "steps": steps,
        **scales,
    }
    constants = {
        "GROUP": group,
        "TOKENS": configuration.tokens,
        "OUTPUTS": configuration.outputs,
        "BLOCKS": blocks,
        "SPLIT": splits > 1,
        "ASM": inline_assembly(),
    }
    grid = (cdiv(outputs, configuration.outputs), cdiv(tokens, configuration.tokens), splits)
    weights = configuration.outputs * step
    launch(
        Launch(
            small_matmul_kernel,
            grid,
            arguments,
            constants,
            configuration.num_warps,
            configuration.num_stages,
            weights,
            weights * configuration.tokens,
        )
    )
    if splits > 1:
        arguments = {"partials_ptr": written, "y_ptr": y, "M": tokens, "N": outputs, "splits": splits, **scales}
        constants = {"GROUPED": group > 0, "OUTPUTS": 256}
        launch(Launch(add_partials_kernel, (cdiv(outputs, 256), tokens), arguments, constants))
    return y


def _blocks(wanted: int, group: int, columns: int) -> int:
    """The largest number of blocks up to `wanted`, a power of two, that divides the group (or the row)."""
    within = max(group or columns, BLOCK) // BLOCK
    while within % wanted:
        wanted //= 2
    return wanted
