"""Activations to int8 per token, alone or after RMSNorm or SwiGLU, in one kernel that reads its input once.

A program holds a whole token in registers: [groups, inputs of a group], padded to powers of two. Codes and scale of
the plain form equal the reference bit for bit; after a norm or a gate the float that is quantised can differ in its
last bit, so a code may differ if that float is a tie.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.activations import INVERSE_LEVELS, LEVELS, MIN_ABSMAX, QuantizedActivations
from nanochat_kernels.triton_kernels.configurations import quantize_warps
from nanochat_kernels.triton_kernels.language import divide, round_half_even
from nanochat_kernels.triton_kernels.launch import Launch, inline_assembly, launch, require_device

Form = Literal["plain", "rmsnorm", "swiglu"]

MAX_TILE = 32768
"""Most values of a token that the registers of one program hold."""


@triton.jit
def quantize_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    second_ptr,  # rmsnorm: weight [K]; swiglu: up [M, K], rows second_stride apart; plain: unused
    codes_ptr,  # int8 [M, K]
    scale_ptr,  # float32 [M]
    sums_ptr,  # int32 [M, N_GROUPS]
    x_stride,
    second_stride,
    eps,
    N_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,  # N_GROUPS and GROUP padded to powers of two
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
    MIN: tl.constexpr,
    INVERSE: tl.constexpr,
    MAX_CODE: tl.constexpr,
    FUSED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    within = tl.arange(0, WIDTH)
    mask = (group < N_GROUPS)[:, None] & (within < GROUP)[None, :]
    k = group[:, None] * GROUP + within[None, :]
    # Arithmetic on bfloat16 itself is wrong in the interpreter: convert right after loading.
    x = tl.load(x_ptr + token * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    if FORM == "rmsnorm":
        mean = tl.div_rn(tl.sum(tl.sum(x * x, axis=1), axis=0), tl.full((), N_GROUPS * GROUP, tl.float32))
        x = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        x = x * tl.load(second_ptr + k, mask=mask, other=0.0).to(tl.float32)
    if FORM == "swiglu":
        up = tl.load(second_ptr + token * second_stride + k, mask=mask, other=0.0).to(tl.float32)
        x = (x / (1.0 + tl.exp(-x))) * up
    absmax = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    scale = tl.maximum(absmax, MIN) * INVERSE
    ratio = tl.minimum(tl.maximum(divide(x, scale, FUSED), -MAX_CODE), MAX_CODE)
    codes = round_half_even(ratio)
    tl.store(codes_ptr + token * (N_GROUPS * GROUP) + k, codes.to(tl.int8), mask=mask)
    tl.store(scale_ptr + token, scale)
    tl.store(sums_ptr + token * N_GROUPS + group, tl.sum(codes, axis=1), mask=group < N_GROUPS)


def quantize(
    x: Tensor,
    second: Tensor | None = None,
    *,
    form: Form = "plain",
    eps: float = 0.0,
    group: int | None = None,
    num_warps: int | None = None,
) -> QuantizedActivations:
    """The three operations of `reference.activations`, by `form`.

    x: float32, bfloat16 or float16 [..., K]. second: the norm's weight [K], or `up` [..., K]. group: inputs per sum.
    Raises ValueError if the group does not divide K.
    """
    second = x if second is None else second
    require_device(x, second)
    columns = x.shape[-1]
    group = group or columns
    if columns % group:
        raise ValueError(f"{columns} inputs cannot be split into groups of {group}")
    n_groups = columns // group
    groups, width = triton.next_power_of_2(n_groups), triton.next_power_of_2(group)
    if groups * width > MAX_TILE:
        raise Unsupported(f"a token of {columns} inputs in groups of {group} does not fit the registers of a program")
    if any(tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16) for tensor in (x, second)):
        raise Unsupported(f"activations of {x.dtype}, {second.dtype}")
    rows = _rows(x)
    second_rows = second.contiguous() if form == "rmsnorm" else _rows(second)
    leading = x.shape[:-1]
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*leading, 1), dtype=torch.float32, device=x.device)
    sums = torch.empty((*leading, n_groups), dtype=torch.int32, device=x.device)
    arguments = {
        "x_ptr": rows,
        "second_ptr": second_rows,
        "codes_ptr": codes,
        "scale_ptr": scale,
        "sums_ptr": sums,
        "x_stride": rows.stride(0),
        "second_stride": second_rows.stride(0),
        "eps": float(eps),
    }
    constants = {
        "N_GROUPS": n_groups,
        "GROUP": group,
        "GROUPS": groups,
        "WIDTH": width,
        "FORM": form,
        "MIN": MIN_ABSMAX,
        "INVERSE": INVERSE_LEVELS,
        "MAX_CODE": LEVELS,
        "FUSED": inline_assembly(),
    }
    warps = num_warps or quantize_warps(groups * width)
    launch(Launch(quantize_kernel, (rows.shape[0],), arguments, constants, num_warps=warps))
    return QuantizedActivations(codes, scale, sums)


def _rows(x: Tensor) -> Tensor:
    """[..., K] as [M, K] with neighbouring inputs next to each other; a copy only if x is laid out otherwise."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
