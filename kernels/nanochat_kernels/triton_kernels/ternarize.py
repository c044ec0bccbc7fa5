"""Absmean ternarisation in one kernel for one scale per row, of one weight or of all weights of a model.

A program has a few rows, and reads them twice: for their scales from memory, for their codes from the cache. Scales of
groups come from a kernel before it, and that of a whole tensor from two: the second adds partial sums in a fixed order.

The mean of magnitudes is summed in float64, so that its float16 value does not depend on the order; codes come from
the comparison (w > s / 2) - (w < -s / 2), which equals clamp(round(w / s)) because s / 2 is exact. Nothing waits for
the host.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.packing import PLANE
from nanochat_kernels.reference.ternarize import MAX_SCALE, MIN_SCALE, Granularity
from nanochat_kernels.triton_kernels.configurations import TERNARIZE, TernarizeConfiguration
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device

LATENT_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
OPERAND_DTYPES = {**LATENT_DTYPES, torch.int8: tl.int8}
LIMITS = {"MIN": MIN_SCALE, "MAX": MAX_SCALE}


@triton.jit
def float16_scale(mean, MIN: tl.constexpr, MAX: tl.constexpr):
    """A float64 mean as a scale: rounded to float32, clamped, rounded to float16, as float32."""
    return tl.minimum(tl.maximum(mean.to(tl.float32), MIN), MAX).to(tl.float16).to(tl.float32)


@triton.jit
def divide(numerator, count, reciprocal):
    """float64 / integer count, given float32(1 / count): products only, right to about the last bit of a float64.

    Triton's float64 division is a call around which registers spill.
    """
    count = tl.zeros_like(numerator) + count
    reciprocal = tl.zeros_like(numerator) + reciprocal
    reciprocal = reciprocal * (2.0 - count * reciprocal)
    quotient = numerator * reciprocal
    return quotient + (numerator - quotient * count) * reciprocal


@triton.jit
def segment_scales_kernel(
    weight_ptr,  # [total], contiguous
    result_ptr,  # float32 scales or float64 sums, one per segment
    total,
    segments,
    length,  # elements of a segment; the last one may be cut short by total
    reciprocal,  # 1 / length
    SUMS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    start = segment.to(tl.int64) * length
    within = tl.arange(0, BLOCK)
    sums = tl.zeros((SEGMENTS, BLOCK), tl.float64)
    for block in range(0, tl.cdiv(length, BLOCK)):
        position = block * BLOCK + within
        index = start[:, None] + position[None, :]
        mask = (position < length)[None, :] & (segment < segments)[:, None] & (index < total)
        sums += tl.abs(tl.load(weight_ptr + index, mask=mask, other=0.0).to(tl.float32)).to(tl.float64)
    magnitude = tl.sum(sums, axis=1)
    if SUMS:
        tl.store(result_ptr + segment, magnitude, mask=segment < segments)
    else:
        tl.store(
            result_ptr + segment,
            float16_scale(divide(magnitude, length, reciprocal), MIN, MAX),
            mask=segment < segments,
        )


@triton.jit
def tensor_scale_kernel(
    sums_ptr,  # float64 [parts]
    scale_ptr,  # float32 [1]
    parts,
    total,
    reciprocal,  # 1 / total
    BLOCK: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for block in range(0, tl.cdiv(parts, BLOCK)):
        position = block * BLOCK + index
        sums += tl.load(sums_ptr + position, mask=position < parts, other=0.0)
    tl.store(scale_ptr, float16_scale(divide(tl.sum(sums, axis=0), total, reciprocal), MIN, MAX))


@triton.jit
def ternarize_blocks(
    weight_ptr,  # [N, K], contiguous, as codes and packed are
    scales_ptr,  # float32: written if OWN, else read
    codes_ptr,  # [N, K] of any dtype
    packed_ptr,  # uint8 [N, K / 4]
    first_row,
    first_block,  # of 128 inputs
    last_block,
    N,
    K,
    reciprocal,  # 1 / K
    scale_stride,  # between rows: 0 for one scale of the tensor
    group,  # a multiple of 32 inputs
    OWN: tl.constexpr,  # one scale per row, computed here; the blocks are then those of a whole row
    GROUPED: tl.constexpr,
    CODES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    """Blocks of a few rows. A plane of a block is an axis of the tile, contiguous in all matrices."""
    OPERAND: tl.constexpr = codes_ptr.dtype.element_ty
    row = (first_row + tl.arange(0, ROWS))[:, None, None]
    block = tl.arange(0, BLOCKS)[None, :, None]
    within = tl.arange(0, 32)[None, None, :]
    in_rows = row < N
    line = row.to(tl.int64)
    if OWN:
        sums = tl.zeros((ROWS, BLOCKS, 32), tl.float64)
        for first in range(first_block, last_block, BLOCKS):
            for plane in tl.static_range(4):
                column = (first + block) * 128 + (plane * 32 + within)
                weight = tl.load(weight_ptr + line * K + column, mask=in_rows & (column < K), other=0.0)
                sums += tl.abs(weight.to(tl.float32)).to(tl.float64)
        magnitude = tl.sum(tl.sum(sums, axis=2, keep_dims=True), axis=1, keep_dims=True)
        scale = float16_scale(divide(magnitude, K, reciprocal), MIN, MAX)
        tl.store(scales_ptr + line, scale, mask=in_rows)
        half = scale * 0.5
    elif not GROUPED:
        half = tl.load(scales_ptr + line * scale_stride, mask=in_rows, other=1.0) * 0.5
    for first in range(first_block, last_block, BLOCKS):
        packed = tl.zeros((ROWS, BLOCKS, 32), tl.int32)
        for plane in tl.static_range(4):
            column = (first + block) * 128 + (plane * 32 + within)
            mask = in_rows & (column < K)
            if GROUPED:
                start = (first + block) * 128 + plane * 32
                at = scales_ptr + line * scale_stride + start // group
                half = tl.load(at, mask=in_rows & (start < K), other=1.0) * 0.5
            weight = tl.load(weight_ptr + line * K + column, mask=mask, other=0.0).to(tl.float32)
            codes = (weight > half).to(tl.int32) - (weight < -half).to(tl.int32)
            if CODES:
                value = codes if tl.int8 == OPERAND else codes.to(tl.float32)
                tl.store(codes_ptr + line * K + column, value.to(OPERAND), mask=mask)
            packed |= (codes + 1) << (2 * plane)
        if PACKED:
            byte = (first + block) * 32 + within
            mask = in_rows & ((first + block) * 128 < K)
            tl.store(packed_ptr + line * (K // 4) + byte, packed.to(tl.uint8), mask=mask)


@triton.jit
def codes_kernel(
    weight_ptr,
    scales_ptr,
    codes_ptr,
    packed_ptr,
    N,
    K,
    reciprocal,
    scale_stride,
    group,
    OWN: tl.constexpr,
    GROUPED: tl.constexpr,
    CODES: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    first_block = 0 if OWN else tl.program_id(1) * BLOCKS
    last_block = tl.cdiv(K, 128) if OWN else first_block + BLOCKS
    ternarize_blocks(
        weight_ptr, scales_ptr, codes_ptr, packed_ptr, tl.program_id(0) * ROWS, first_block, last_block, N, K,
        reciprocal, scale_stride, group, OWN, GROUPED, CODES, PACKED, ROWS, BLOCKS, MIN, MAX,
    )  # fmt: skip


@triton.jit
def refresh_kernel(
    table_ptr,  # int64 [layers, 4]: addresses of the weight, its scales, codes and packed bytes
    N,
    K,
    reciprocal,
    LATENT: tl.constexpr,  # dtypes
    OPERAND: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MIN: tl.constexpr,
    MAX: tl.constexpr,
):
    table = table_ptr + tl.program_id(1) * 4
    weight_ptr = tl.multiple_of(tl.load(table).to(tl.pointer_type(LATENT)), 16)
    scales_ptr = tl.multiple_of(tl.load(table + 1).to(tl.pointer_type(tl.float32)), 16)
    codes_ptr = tl.multiple_of(tl.load(table + 2).to(tl.pointer_type(OPERAND)), 16)
    packed_ptr = tl.multiple_of(tl.load(table + 3).to(tl.pointer_type(tl.uint8)), 16)
    ternarize_blocks(
        weight_ptr, scales_ptr, codes_ptr, packed_ptr, tl.program_id(0) * ROWS, 0, tl.cdiv(K, 128), N, K,
        reciprocal, 1, K, True, False, True, PACKED, ROWS, BLOCKS, MIN, MAX,
    )  # fmt: skip


@dataclass(frozen=True)
class TernaryForms:
    """scales: float32 [1, 1], [N, 1] or [N, K / g]. A form of the codes that was not requested is None.

    codes: int8 [N, K]; packed: uint8 [N, K / 4], plane-128.
    """

    scales: Tensor
    codes: Tensor | None
    packed: Tensor | None


def ternarize_forms(
    weight: Tensor,
    granularity: Granularity = "row",
    *,
    codes: bool = True,
    packed: bool = False,
    configuration: TernarizeConfiguration = TERNARIZE,
) -> TernaryForms:
    """Scales, and the codes in every requested form.

    weight: float32, bfloat16 or float16 [N, K]. Raises ValueError if a group, or 128 for packing, does not divide K,
    and Unsupported for groups that are no multiple of 32 inputs.
    """
    require_device(weight)
    if weight.dtype not in LATENT_DTYPES:
        raise Unsupported(f"weights of {weight.dtype}")
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    if packed and columns % PLANE:
        raise ValueError(f"K = {columns} is not a multiple of {PLANE}")
    device, own = weight.device, granularity == "row"
    scales = torch.empty((rows, 1), device=device) if own else _shared_scales(weight, granularity, configuration)
    forms = TernaryForms(
        scales,
        torch.empty((rows, columns), dtype=torch.int8, device=device) if codes else None,
        torch.empty((rows, columns // 4), dtype=torch.uint8, device=device) if packed else None,
    )
    arguments = {
        "weight_ptr": weight,
        "scales_ptr": scales,
        # A form that is not written still needs a pointer of the right type.
        "codes_ptr": scales.view(torch.int8) if forms.codes is None else forms.codes,
        "packed_ptr": scales.view(torch.uint8) if forms.packed is None else forms.packed,
        "N": rows,
        "K": columns,
        "reciprocal": 1.0 / columns,
        "scale_stride": 0 if granularity == "tensor" else scales.shape[1],
        "group": columns // scales.shape[1],
    }
    constants = {"OWN": own, "GROUPED": scales.shape[1] > 1, "CODES": codes, "PACKED": packed}
    constants |= _tile(configuration)
    chunks = 1 if own else triton.cdiv(columns, PLANE * configuration.blocks)
    grid = (triton.cdiv(rows, configuration.rows), chunks)
    launch(Launch(codes_kernel, grid, arguments, constants, configuration.num_warps))
    return forms


def ternarize_rows(
    latents: Sequence[Tensor], scales: Sequence[Tensor], operands: Sequence[Tensor], packed: Sequence[Tensor | None]
) -> None:
    """`reference.operations.ternarize_rows`: weights of one shape and the same dtypes take one launch together.

    The kernel reads their addresses from a table, which is copied to the device without waiting for it.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for tensors in zip(latents, scales, operands, packed, strict=True):
        latent, _, operand, held = tensors
        given = [tensor for tensor in tensors if tensor is not None]
        require_device(*given)
        if latent.dtype not in LATENT_DTYPES or operand.dtype not in OPERAND_DTYPES:
            raise Unsupported(f"weights of {latent.dtype} as {operand.dtype}")
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        if any(address % 16 for address in addresses) or not all(tensor.is_contiguous() for tensor in given):
            raise Unsupported("weights that are not contiguous, or not aligned to 16 bytes")
        alike.setdefault((*latent.shape, latent.dtype, operand.dtype, held is not None), []).extend(addresses)
    if not alike:
        return
    device = latents[0].device
    table = torch.tensor([address for group in alike.values() for address in group], dtype=torch.int64)
    table = table.view(-1, 4).to(device, non_blocking=True)
    first = 0
    for (rows, columns, latent_dtype, operand_dtype, holds), addresses in alike.items():
        last = first + len(addresses) // 4
        arguments = {"table_ptr": table[first:last], "N": rows, "K": columns, "reciprocal": 1.0 / columns}
        constants = {"LATENT": LATENT_DTYPES[latent_dtype], "OPERAND": OPERAND_DTYPES[operand_dtype], "PACKED": holds}
        grid = (triton.cdiv(rows, TERNARIZE.rows), last - first)
        launch(Launch(refresh_kernel, grid, arguments, constants | _tile(TERNARIZE), TERNARIZE.num_warps))
        first = last


def _tile(configuration: TernarizeConfiguration) -> dict[str, int | float]:
    return {"ROWS": configuration.rows, "BLOCKS": configuration.blocks, **LIMITS}


def _shared_scales(weight: Tensor, granularity: Granularity, configuration: TernarizeConfiguration) -> Tensor:
    """One scale of the tensor, or one per group of inputs. weight: [N, K], contiguous."""
    rows, columns = weight.shape
    if granularity == "tensor":
        length = configuration.partial
        segments = triton.cdiv(weight.numel(), length)
        result = torch.empty(segments, dtype=torch.float64, device=weight.device)
    else:
        length = int(granularity)
        if length <= 0 or columns % length:
            raise ValueError(f"a weight with {columns} inputs cannot be split into groups of {granularity}")
        if length % 32:
            raise Unsupported(f"groups of {length} inputs; a plane has 32")
        segments = weight.numel() // length
        result = torch.empty((rows, columns // length), dtype=torch.float32, device=weight.device)
    block = min(triton.next_power_of_2(length), configuration.block)
    together = max(configuration.block // block, 1)
    arguments = {
        "weight_ptr": weight,
        "result_ptr": result,
        "total": weight.numel(),
        "segments": segments,
        "length": length,
        "reciprocal": 1.0 / length,
    }
    constants = {"SUMS": granularity == "tensor", "SEGMENTS": together, "BLOCK": block, **LIMITS}
    grid = (triton.cdiv(segments, together),)
    launch(Launch(segment_scales_kernel, grid, arguments, constants, configuration.num_warps))
    if granularity != "tensor":
        return result
    scale = torch.empty((1, 1), dtype=torch.float32, device=weight.device)
    total = weight.numel()
    arguments = {"sums_ptr": result, "scale_ptr": scale, "parts": segments, "total": total, "reciprocal": 1.0 / total}
    constants = {"BLOCK": configuration.block, **LIMITS}
    launch(Launch(tensor_scale_kernel, (1,), arguments, constants, configuration.num_warps))
    return scale
