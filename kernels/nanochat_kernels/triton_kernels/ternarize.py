"""Absmean ternarisation: one kernel for the scales, one for the codes in all requested forms.

The mean of magnitudes is summed in float64, so that its float16 value does not depend on the order; codes come from
the comparison (w > s / 2) - (w < -s / 2), which equals clamp(round(w / s)) because s / 2 is exact. A scale for the
whole tensor takes a third kernel that adds the partial sums of the first, in a fixed order: nothing waits for the host.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.packing import PLANE
from nanochat_kernels.reference.ternarize import MAX_SCALE, MIN_SCALE, Granularity
from nanochat_kernels.triton_kernels.configurations import TERNARIZE, TernarizeConfiguration
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device


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
def codes_kernel(
    weight_ptr,  # [N, K], contiguous
    scales_ptr,  # float32
    codes_ptr,  # int8 [N, K]
    transposed_ptr,  # int8 [K, N]
    packed_ptr,  # uint8 [N, K / 4]
    N,
    K,
    scale_stride,  # between rows: 0 for one scale of the tensor
    group,
    GROUPED: tl.constexpr,
    CODES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,  # blocks of 128 inputs
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * (PLANES * 32) + tl.arange(0, PLANES * 32)
    offset = row.to(tl.int64)
    in_rows = (row < N)[:, None]
    packed = tl.zeros((ROWS, PLANES * 32), tl.int32)
    if not GROUPED:
        half = (tl.load(scales_ptr + offset * scale_stride, mask=row < N, other=1.0) * 0.5)[:, None]
    for plane in tl.static_range(4):
        column = byte // 32 * 128 + plane * 32 + byte % 32
        mask = in_rows & (column < K)[None, :]
        if GROUPED:
            index = offset[:, None] * scale_stride + (column // group)[None, :]
            half = tl.load(scales_ptr + index, mask=mask, other=1.0) * 0.5
        weight = tl.load(weight_ptr + offset[:, None] * K + column[None, :], mask=mask, other=0.0).to(tl.float32)
        codes = (weight > half).to(tl.int32) - (weight < -half).to(tl.int32)
        if CODES:
            tl.store(codes_ptr + offset[:, None] * K + column[None, :], codes.to(tl.int8), mask=mask)
        if TRANSPOSED:
            index = column.to(tl.int64)[None, :] * N + row[:, None]
            tl.store(transposed_ptr + index, codes.to(tl.int8), mask=mask)
        packed |= (codes + 1) << (2 * plane)
    if PACKED:
        mask = in_rows & (byte * 4 < K)[None, :]
        tl.store(packed_ptr + offset[:, None] * (K // 4) + byte[None, :], packed.to(tl.uint8), mask=mask)


@dataclass(frozen=True)
class TernaryForms:
    """scales: float32 [1, 1], [N, 1] or [N, K / g]. A form of the codes that was not requested is None.

    codes: int8 [N, K]; transposed: int8 [K, N]; packed: uint8 [N, K / 4], plane-128.
    """

    scales: Tensor
    codes: Tensor | None
    transposed: Tensor | None
    packed: Tensor | None


def absmean_scales(
    weight: Tensor, granularity: Granularity, configuration: TernarizeConfiguration = TERNARIZE
) -> Tensor:
    """`reference.ternarize.absmean_scales` without a host sync. weight: float [N, K], contiguous."""
    require_device(weight)
    rows, columns = weight.shape
    limits = {"MIN": MIN_SCALE, "MAX": MAX_SCALE}
    if granularity == "tensor":
        length = configuration.partial
        segments = triton.cdiv(weight.numel(), length)
        result = torch.empty(segments, dtype=torch.float64, device=weight.device)
    else:
        length = columns if granularity == "row" else int(granularity)
        if length <= 0 or columns % length:
            raise ValueError(f"a weight with {columns} inputs cannot be split into groups of {granularity}")
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
    constants = {"SUMS": granularity == "tensor", "SEGMENTS": together, "BLOCK": block, **limits}
    grid = (triton.cdiv(segments, together),)
    launch(Launch(segment_scales_kernel, grid, arguments, constants, configuration.num_warps))
    if granularity != "tensor":
        return result
    scale = torch.empty((1, 1), dtype=torch.float32, device=weight.device)
    total = weight.numel()
    arguments = {"sums_ptr": result, "scale_ptr": scale, "parts": segments, "total": total, "reciprocal": 1.0 / total}
    constants = {"BLOCK": configuration.block, **limits}
    launch(Launch(tensor_scale_kernel, (1,), arguments, constants, configuration.num_warps))
    return scale


def ternarize_forms(
    weight: Tensor,
    granularity: Granularity = "row",
    *,
    codes: bool = True,
    transposed: bool = False,
    packed: bool = False,
    configuration: TernarizeConfiguration = TERNARIZE,
) -> TernaryForms:
    """Scales, and the codes in every requested form, which takes one more reading of the weight.

    weight: float32, bfloat16 or float16 [N, K]. Raises ValueError if a group, or 128 for packing, does not divide K.
    """
    require_device(weight)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"weights of {weight.dtype}")
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    if packed and columns % PLANE:
        raise ValueError(f"K = {columns} is not a multiple of {PLANE}")
    scales = absmean_scales(weight, granularity, configuration)
    device = weight.device
    forms = TernaryForms(
        scales,
        torch.empty((rows, columns), dtype=torch.int8, device=device) if codes else None,
        torch.empty((columns, rows), dtype=torch.int8, device=device) if transposed else None,
        torch.empty((rows, columns // 4), dtype=torch.uint8, device=device) if packed else None,
    )
    arguments = {
        "weight_ptr": weight,
        "scales_ptr": scales,
        # A form that is not written still needs a pointer of the right type.
        "codes_ptr": scales.view(torch.int8) if forms.codes is None else forms.codes,
        "transposed_ptr": scales.view(torch.int8) if forms.transposed is None else forms.transposed,
        "packed_ptr": scales.view(torch.uint8) if forms.packed is None else forms.packed,
        "N": rows,
        "K": columns,
        "scale_stride": 0 if granularity == "tensor" else scales.shape[1],
        "group": columns // scales.shape[1],
    }
    constants = {
        "GROUPED": scales.shape[1] > 1,
        "CODES": codes,
        "TRANSPOSED": transposed,
        "PACKED": packed,
        "ROWS": configuration.rows,
        "PLANES": configuration.planes,
    }
    grid = (triton.cdiv(rows, configuration.rows), triton.cdiv(columns, PLANE * configuration.planes))
    launch(Launch(codes_kernel, grid, arguments, constants, configuration.num_warps))
    return forms
