"""NVFP4 on Blackwell: activations to e2m1 in blocks of 16, and their product with ternary weights in e2m1.

The quantizer equals `reference.nvfp4` bit for bit. The product is one `tl.dot_scaled` per tile, which compiles to the
block-scaled instructions of compute capability 10 and 12; they add in float32, in an order of their own. Where kernels
are interpreted, which `dot_scaled` cannot be, a twin unpacks both operands to float32. Compiled and interpreted, never
run on a Blackwell GPU.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.nvfp4 import BLOCK, INVERSE_CODE, INVERSE_LARGEST, MAJORS, MIN_ABSMAX, Nvfp4Activations
from nanochat_kernels.triton_kernels.configurations import MatmulConfiguration, nvfp4_configuration, quantize_warps
from nanochat_kernels.triton_kernels.int8_matmul import OUTPUT_DTYPES
from nanochat_kernels.triton_kernels.language import round_half_even
from nanochat_kernels.triton_kernels.launch import Launch, cdiv, inline_assembly, launch, require_device
from nanochat_kernels.triton_kernels.quantize import MAX_TILE


@triton.jit
def _bits(x):
    """Magnitudes as int32, in which NaN is the largest: `tl.max` of floats would lose it."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _e4m3_bits(x):
    """The nearest e4m3 number to a float32 ≥ 0, ties to even, as its byte; 0x7F (NaN) beyond 464."""
    bits = tl.minimum(x.to(tl.int32, bitcast=True), 0x43F00000)  # of 480; the NaN of a GPU would overflow the next line
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponents count from 127 there, from 7 here
    small = tl.where(x < 0.015625, x, 0.0)
    return tl.where(x < 0.015625, round_half_even(small * 512.0).to(tl.int32), normal)


@triton.jit
def _e4m3_values(byte):
    """The float32 of an e4m3 byte ≥ 0."""
    normal = ((byte + 960) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte == 0x7F, float("nan"), tl.where(byte < 8, byte.to(tl.float32) * 0.001953125, normal))


@triton.jit
def _e2m1_codes(x, z, block):
    """Codes of |z| / block, to nearest, ties to even, with the sign of x."""
    z = tl.abs(z)
    code = (z > 0.25 * block).to(tl.int32) + (z >= 0.75 * block).to(tl.int32) + (z > 1.25 * block).to(tl.int32)
    code += (z >= 1.75 * block).to(tl.int32) + (z > 2.5 * block).to(tl.int32) + (z >= 3.5 * block).to(tl.int32)
    code += (z > 5.0 * block).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)


@triton.jit
def _e2m1_values(code):
    """The float32 of a code, an int32."""
    magnitude = code & 7
    normal = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)  # 0b10 is 1.0, whose bits are 0x3F800000
    value = tl.where(magnitude < 2, magnitude.to(tl.float32) * 0.5, normal)
    return tl.where(code > 7, -value, value)


@triton.jit
def _unpack(byte, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """uint8 [ROWS, COLUMNS / 2] to float32 [ROWS, COLUMNS]."""
    byte = byte.to(tl.int32)
    return tl.reshape(tl.join(_e2m1_values(byte & 15), _e2m1_values(byte >> 4)), (ROWS, COLUMNS))


@triton.jit
def nvfp4_quantize_kernel(
    x_ptr,  # [M, K], rows x_stride apart
    packed_ptr,  # uint8 [M, 9 K / 16]
    scale_ptr,  # float32 [M]
    x_stride,
    N_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,  # N_BLOCKS padded to a power of two
    MIN: tl.constexpr,
    INVERSE: tl.constexpr,
    INVERSE_CODE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    mask = block < N_BLOCKS
    k = block[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + token * x_stride + k, mask=mask[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.max(_bits(x), axis=1), axis=0)
    least = tl.full((), MIN, tl.float32).to(tl.int32, bitcast=True)
    scale = tl.maximum(largest, least).to(tl.float32, bitcast=True) * INVERSE
    z = tl.div_rn(x, scale + tl.zeros_like(x))
    peak = tl.max(_bits(z), axis=1).to(tl.float32, bitcast=True)
    byte = tl.maximum(_e4m3_bits(peak * INVERSE_CODE), 1)
    codes = _e2m1_codes(x, z, _e4m3_values(byte)[:, None])
    low, high = tl.split(tl.reshape(codes.to(tl.uint8), (BLOCKS, 8, 2)))
    row = packed_ptr + token * (9 * N_BLOCKS)
    tl.store(row + block[:, None] * 8 + tl.arange(0, 8)[None, :], low | (high << 4), mask=mask[:, None])
    tl.store(row + 8 * N_BLOCKS + block, byte.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + token, scale)


@triton.jit
def nvfp4_matmul_kernel(
    a_ptr,  # uint8 [M, 9 K / 16], contiguous
    b_ptr,  # uint8 [N, K / 2], contiguous
    a_scale_ptr,  # float32 [M]
    b_scale_ptr,  # float32, b_scale_stride (1, or 0 for one scale) apart
    y_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    a_stride,
    b_stride,
    b_scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr,
    EVEN_K: tl.constexpr,
    NATIVE: tl.constexpr,  # tl.dot_scaled, not its twin
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
    k = tl.arange(0, BLOCK_K // 2)
    blocks = tl.arange(0, BLOCK_K // 16)
    # Rows beyond the edge read the last row again, which needs no mask; they are not stored.
    a_row = a_ptr + tl.minimum(m, M - 1).to(tl.int64)[:, None] * a_stride
    a = a_row + k[None, :]
    a_blocks = a_row + b_stride + blocks[None, :]
    b = b_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * b_stride + k[None, :]
    ones = tl.full((BLOCK_N, BLOCK_K // 16), 1.0, tl.float32)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(a)
            scales = tl.load(a_blocks)
            w = tl.load(b)
        else:  # what is beyond the row is 0 · 0
            left = K - step * BLOCK_K
            x = tl.load(a, mask=(k * 2 < left)[None, :], other=0)
            scales = tl.load(a_blocks, mask=(blocks * 16 < left)[None, :], other=0)
            w = tl.load(b, mask=(k * 2 < left)[None, :], other=0)
        if NATIVE:
            scales = scales.to(tl.float8e4nv, bitcast=True)
            total = tl.dot_scaled(x, scales, "e2m1", tl.trans(w), ones.to(tl.float8e4nv), "e2m1", total)
        else:
            wide = tl.reshape(_e4m3_values(scales.to(tl.int32)), (BLOCK_M, BLOCK_K // 16, 1))
            wide = tl.reshape(tl.broadcast_to(wide, (BLOCK_M, BLOCK_K // 16, 16)), (BLOCK_M, BLOCK_K))
            values = _unpack(x, BLOCK_M, BLOCK_K) * wide
            total = tl.dot(values, tl.trans(_unpack(w, BLOCK_N, BLOCK_K)), acc=total, input_precision="ieee")
        a += BLOCK_K // 2
        a_blocks += BLOCK_K // 16
        b += BLOCK_K // 2
    a_scale = tl.load(a_scale_ptr + m, mask=m < M, other=0.0)
    b_scale = tl.load(b_scale_ptr + n * b_scale_stride, mask=n < N, other=0.0)
    y = (total * a_scale[:, None]) * b_scale[None, :]
    index = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def nvfp4_quantize(x: Tensor) -> Nvfp4Activations:
    """`reference.nvfp4.nvfp4_quantize`. x: float32, bfloat16 or float16 [..., K]."""
    require_device(x)
    width = x.shape[-1]
    if width % BLOCK:
        raise ValueError(f"{width} inputs cannot be split into NVFP4 blocks of {BLOCK}")
    padded = triton.next_power_of_2(width // BLOCK)
    if padded * BLOCK > MAX_TILE:
        raise Unsupported(f"a token of {width} inputs does not fit the registers of a program")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise Unsupported(f"activations of {x.dtype}")
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    packed = torch.empty((*x.shape[:-1], width // BLOCK * 9), dtype=torch.uint8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    arguments = {"x_ptr": rows, "packed_ptr": packed, "scale_ptr": scale, "x_stride": rows.stride(0)}
    constants = {
        "N_BLOCKS": width // BLOCK,
        "BLOCKS": padded,
        "MIN": MIN_ABSMAX,
        "INVERSE": INVERSE_LARGEST,
        "INVERSE_CODE": INVERSE_CODE,
    }
    warps = quantize_warps(padded * BLOCK * 2)
    launch(Launch(nvfp4_quantize_kernel, (rows.shape[0],), arguments, constants, num_warps=warps))
    return Nvfp4Activations(packed, scale)


def nvfp4_matmul(
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    configuration: MatmulConfiguration | None = None,
) -> Tensor:
    """`reference.nvfp4.nvfp4_matmul`, with sums in float32. Unsupported where tensor cores have no NVFP4."""
    capability = require_device(packed, scale, weight, w_scale)
    if inline_assembly() and capability // 10 not in MAJORS:
        raise Unsupported(f"compute capability {capability / 10} has no NVFP4")
    (rows, length), (outputs, half) = packed.shape, weight.shape
    columns = 2 * half
    if length * BLOCK != columns * 9 or scale.numel() != rows or w_scale.numel() not in (1, outputs):
        raise ValueError(
            f"shapes do not fit: {list(packed.shape)} · {list(weight.shape)}ᵀ with scales {list(scale.shape)} and"
            f" {list(w_scale.shape)}"
        )
    if out_dtype not in OUTPUT_DTYPES:
        raise Unsupported(f"output of {out_dtype}")
    configuration = configuration or nvfp4_configuration(capability, columns)
    y = torch.empty((rows, outputs), dtype=out_dtype, device=packed.device)
    arguments = {
        "a_ptr": packed.contiguous(),
        "b_ptr": weight.contiguous(),
        "a_scale_ptr": scale.to(torch.float32).contiguous(),
        "b_scale_ptr": w_scale.to(torch.float32).contiguous(),
        "y_ptr": y,
        "M": rows,
        "N": outputs,
        "K": columns,
        "a_stride": length,  # arguments, whose alignment the compiler knows
        "b_stride": half,
        "b_scale_stride": int(w_scale.numel() > 1),
    }
    constants = {
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": configuration.block_k,
        "SWIZZLE": configuration.swizzle,
        "EVEN_K": columns % configuration.block_k == 0,
        "NATIVE": inline_assembly(),
    }
    grid = (cdiv(rows, configuration.block_m) * cdiv(outputs, configuration.block_n),)
    launch(Launch(nvfp4_matmul_kernel, grid, arguments, constants, configuration.num_warps, configuration.num_stages))
    return y
