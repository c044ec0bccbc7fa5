"""Parts that several kernels share: rounding, dp4a, unpacking of planes.

Inline PTX has a twin in plain Triton, chosen by the constexpr ASM: the interpreter cannot run PTX.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""Whether kernels run in the interpreter. Decided when triton is imported, as triton's own library functions are."""


@triton.jit
def round_half_even(x):
    """float32 of magnitude below 2²² to the nearest int32, ties to even, as torch.round: 1.5 · 2²³ has spacing 1."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def divide(x, y, FUSED: tl.constexpr):
    """x / y, correctly rounded, for one float32 y of all x; right unless x is so small that the quotient rounds to 0.

    FUSED, which the interpreter cannot: five instructions a value instead of a dozen and more. The reciprocal is
    correctly rounded, the first step gives one of the two neighbours of the quotient, so the second gives the nearer
    one (Markstein 1990, theorem 8.2 in Cornea, Harrison and Tang 2002).
    """
    if not FUSED:
        return tl.div_rn(x, y + tl.zeros_like(x))
    reciprocal = tl.div_rn(1.0, y) + tl.zeros_like(x)
    negative = y * -1.0 + tl.zeros_like(x)
    quotient = x * reciprocal
    quotient = tl.fma(tl.fma(quotient, negative, x), reciprocal, quotient)
    return tl.fma(tl.fma(quotient, negative, x), reciprocal, quotient)


@triton.jit
def dp4a(a, b, c, ASM: tl.constexpr):
    """c + Σ of the products of four unsigned bytes of `a` with four signed bytes of `b`. int32 tensors of one shape."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    total = c
    for i in tl.static_range(4):
        total += ((a >> (8 * i)) & 0xFF) * ((b << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def unpack_planes(q, ASM: tl.constexpr):
    """A tile of plane-128 bytes to four int8 tiles of biased codes w + 1: inputs j, j + 32, j + 64, j + 96.

    The PTX form handles four bytes per instruction; Triton's own shifts work byte by byte (three times the work).
    """
    if ASM:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 t1, t2, t3;
            and.b32 $0, $4, 0x03030303;
            shr.u32 t1, $4, 2;
            and.b32 $1, t1, 0x03030303;
            shr.u32 t2, $4, 4;
            and.b32 $2, t2, 0x03030303;
            shr.u32 t3, $4, 6;
            and.b32 $3, t3, 0x03030303;
            }""",
            "=r,=r,=r,=r,r",
            [q],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    return (q & 3).to(tl.int8), ((q >> 2) & 3).to(tl.int8), ((q >> 4) & 3).to(tl.int8), ((q >> 6) & 3).to(tl.int8)
