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
from nanochat_kernels.reference.packing import PLANE
from nanochat_kernels.triton_kernels.configurations import UNPACK, UnpackConfiguration
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device

DTYPES = (torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)


@triton.jit
def unpack_kernel(
    packed_ptr,  # uint8 [N, K / 4], as int32 where the result is
    scales_ptr,  # float32 [N, groups]
    result_ptr,  # [N, K]; float8_e4m3fn as its bytes, int8 as words of four
    N,
    blocks,  # K / 128
    groups,
    GROUP: tl.constexpr,
    SCALED: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    # A plane of a block is contiguous in both matrices. It is an axis of the tile, or the compiler would not see that
    # and move single bytes.
    WORDS: tl.constexpr = result_ptr.dtype.element_ty == tl.int32
    PLANE: tl.constexpr = 8 if WORDS else 32
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    block = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS))[None, :, None]
    within = tl.arange(0, PLANE)[None, None, :]
    mask = (row < N) & (block < blocks)
    first = row.to(tl.int64) * blocks + block
    q = tl.load(packed_ptr + (first * PLANE + within), mask=mask, other=0).to(tl.int32)
    for plane in tl.static_range(4):
        if WORDS:
            # Four bytes at once, w + 1 to w: 0x7F + (w + 1) carries into no other byte; then the highest bit is wrong.
            value = (((q >> (2 * plane)) & 0x03030303) + 0x7F7F7F7F) ^ -0x7F7F7F80
        else:
            code = ((q >> (2 * plane)) & 3) - 1
            if FLOAT8:
                # ±1 is 0x38 with the sign in bit 7: no conversion, which compute capability 8.0 lacks.
                value = tl.where(code == 0, 0, tl.where(code > 0, 0x38, 0xB8)).to(tl.uint8)
            elif SCALED:
                group = row.to(tl.int64) * groups + (block * 128 + plane * 32) // GROUP
                value = code.to(tl.float32) * tl.load(scales_ptr + group, mask=mask, other=0.0)
            else:
                value = code.to(tl.float32)
        at = result_ptr + (first * (4 * PLANE) + (plane * PLANE + within))
        tl.store(at, value.to(result_ptr.dtype.element_ty), mask=mask)


def unpack(
    weight: PackedTernary, dtype: torch.dtype = torch.int8, configuration: UnpackConfiguration = UNPACK
) -> Tensor:
    """The codes -1, 0, 1 as [N, K] of int8, bfloat16, float16, float32 or float8_e4m3fn. Does not check for code 3."""
    if dtype not in DTYPES:
        raise Unsupported(f"weights of {dtype}")
    return _unpack(weight, dtype, False, configuration)


def unpack_effective(weight: PackedTernary, configuration: UnpackConfiguration = UNPACK) -> Tensor:
    """codes · scale as float16 [N, K]: exact, because scales are float16 numbers by definition.

    Raises Unsupported for groups that are no multiple of 32 inputs.
    """
    if weight.group % 32:
        raise Unsupported(f"groups of {weight.group} inputs; a plane has 32")
    return _unpack(weight, torch.float16, True, configuration)


def _unpack(weight: PackedTernary, dtype: torch.dtype, scaled: bool, configuration: UnpackConfiguration) -> Tensor:
    require_device(weight.packed)
    rows, columns = weight.rows, weight.columns
    result = torch.empty((rows, columns), dtype=dtype, device=weight.packed.device)
    packed, target = weight.packed, result
    if dtype == torch.int8:
        packed, target = packed.view(torch.int32), result.view(torch.int32)
    elif dtype == torch.float8_e4m3fn:
        target = result.view(torch.uint8)
    arguments = {
        "packed_ptr": packed,
        "scales_ptr": weight.scales,
        "result_ptr": target,
        "N": rows,
        "blocks": columns // PLANE,
        "groups": weight.n_groups,
    }
    blocks = max(configuration.blocks // dtype.itemsize, 1)
    constants = {
        "GROUP": weight.group if scaled else 0,
        "SCALED": scaled,
        "FLOAT8": dtype == torch.float8_e4m3fn,
        "ROWS": configuration.rows,
        "BLOCKS": blocks,
    }
    grid = (triton.cdiv(rows, configuration.rows), triton.cdiv(columns // PLANE, blocks))
    launch(Launch(unpack_kernel, grid, arguments, constants, configuration.num_warps))
    return result
