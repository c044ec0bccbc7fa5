"""Packed weights as a matrix for a tensor-core product: codes of any dtype, or codes times scales in float16.

Prefill unpacks once per call: its cost is that of reading a quarter byte and writing one or two bytes per weight,
against hundreds of tokens' multiply-adds.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.triton_kernels.configurations import UNPACK, UnpackConfiguration
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device

DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


@triton.jit
def unpack_kernel(
    packed_ptr,  # uint8 [N, K / 4]
    scales_ptr,  # float32 [N, groups]
    result_ptr,  # [N, K]; float8_e4m3fn as its bytes
    N,
    K,
    groups,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    offset = row.to(tl.int64)[:, None]
    mask = (row < N)[:, None] & (byte * 4 < K)[None, :]
    q = tl.load(packed_ptr + offset * (K // 4) + byte[None, :], mask=mask, other=1).to(tl.int32)
    for plane in tl.static_range(4):
        column = (byte // 32) * 128 + plane * 32 + byte % 32
        code = ((q >> (2 * plane)) & 3) - 1
        if FLOAT8:
            # ±1 is 0x38 with the sign in bit 7: no conversion, which compute capability 8.0 lacks.
            value = tl.where(code == 0, 0, tl.where(code > 0, 0x38, 0xB8)).to(tl.uint8)
        elif SCALED:
            scale = tl.load(scales_ptr + offset * groups + (column // GROUP)[None, :], mask=mask, other=0.0)
            value = (code.to(tl.float32) * scale).to(result_ptr.dtype.element_ty)
        elif result_ptr.dtype.element_ty == tl.int8:
            value = code.to(tl.int8)
        else:
            value = code.to(tl.float32).to(result_ptr.dtype.element_ty)
        tl.store(result_ptr + offset * K + column[None, :], value, mask=mask)


def unpack(
    weight: PackedTernary, dtype: torch.dtype = torch.int8, configuration: UnpackConfiguration = UNPACK
) -> Tensor:
    """The codes -1, 0, 1 as [N, K] of int8, bfloat16, float16, float32 or float8_e4m3fn. Does not check for code 3."""
    if dtype not in DTYPES:
        raise Unsupported(f"weights of {dtype}")
    return _unpack(weight, dtype, False, configuration)


def unpack_effective(weight: PackedTernary, configuration: UnpackConfiguration = UNPACK) -> Tensor:
    """codes · scale as float16 [N, K]: exact, because scales are float16 numbers by definition."""
    return _unpack(weight, torch.float16, True, configuration)


def _unpack(weight: PackedTernary, dtype: torch.dtype, scaled: bool, configuration: UnpackConfiguration) -> Tensor:
    require_device(weight.packed)
    rows, columns = weight.rows, weight.columns
    result = torch.empty((rows, columns), dtype=dtype, device=weight.packed.device)
    float8 = dtype == torch.float8_e4m3fn
    arguments = {
        "packed_ptr": weight.packed,
        "scales_ptr": weight.scales,
        "result_ptr": result.view(torch.uint8) if float8 else result,
        "N": rows,
        "K": columns,
        "groups": weight.n_groups,
    }
    constants = {
        "GROUP": weight.group if scaled else 0,
        "SCALED": scaled,
        "FLOAT8": float8,
        "ROWS": configuration.rows,
        "BYTES": configuration.bytes,
    }
    grid = (triton.cdiv(rows, configuration.rows), triton.cdiv(columns // 4, configuration.bytes))
    launch(Launch(unpack_kernel, grid, arguments, constants, configuration.num_warps))
    return result
