"""Decode: packed ternary weights times one to four tokens of int8, with dp4a (four multiply-adds per instruction).

A program computes a few outputs; its threads divide their 32-bit words of weights, 16 codes each, among themselves.
Codes stay biased (w + 1), and the sum of the activations corrects the result, so that no weight is ever decremented.

One scale per row: no shifts either. Masks pick the planes in place, so that plane p counts 4^p times, and has its own
accumulator; four shifts at the very end make the sum exact. Scales per group: every word is shifted, corrected,
converted and scaled before it is added, because its scale is only known there.

Every thread must read the activations that belong to its own words. If the compiler arranges both alike, that is a
load; if not, activations go through shared memory with eight barriers per iteration (for instance with four warps and
128 words per row). The committed tiles are of the first kind, which a test of the machine code enforces.
"""

# ruff: noqa: RUF005 (Triton joins tuples with +; it does not unpack them)
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
from nanochat_kernels.triton_kernels.configurations import GEMV_TOKENS, GemvConfiguration, gemv_configuration
from nanochat_kernels.triton_kernels.group_sums import sums_per_scale
from nanochat_kernels.triton_kernels.int8_matmul import OUTPUT_DTYPES
from nanochat_kernels.triton_kernels.language import dp4a
from nanochat_kernels.triton_kernels.launch import Launch, cdiv, inline_assembly, launch, require_device

CODES_PER_WORD = 16
MIN_GROUP = 64


@triton.jit
def row_step(
    sums, w_row, a_ptr, step, words, TOKENS: tl.constexpr, WORDS: tl.constexpr, MASKED: tl.constexpr, ASM: tl.constexpr
):
    """sums plus one tile of words. sums: per token four int32 tiles [rows, WORDS], one per plane."""
    t = tl.arange(0, WORDS)
    inside = step * WORDS + t < words
    # Word t holds inputs 128 (t // 8) + 4 (t % 8) and the three after it, of plane 0; counted in words of activations:
    a_word = step * (4 * WORDS) + (t // 8) * 32 + t % 8
    q = load_words(w_row + (step * WORDS + t)[None, :], inside[None, :], MASKED)
    added = ()
    for token in tl.static_range(TOKENS):
        for plane in tl.static_range(4):
            a = load_activations(a_ptr + token * words * 4 + 8 * plane + a_word, inside, MASKED)
            codes = q & (-1061109568 if plane == 3 else 0x03030303 << (2 * plane))  # the first is 0xC0C0C0C0
            x, u = tl.broadcast(a[None, :], codes)
            added = added + (dp4a(u, x, sums[4 * token + plane], ASM),)
    return added


@triton.jit
def gemv_row_kernel(
    a_ptr,  # int32 [TOKENS, K / 4], four int8 codes each
    a_scale_ptr,  # float32 [TOKENS]
    a_sum_ptr,  # int32 [TOKENS]
    w_ptr,  # int32 [N, K / 16]
    w_scale_ptr,  # float32 [N]
    y_ptr,  # [TOKENS, N]
    N,
    words,  # K / 16
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,  # whether WORDS divides words
    ASM: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the edge read the last row again, which needs no mask; they are not stored.
    w_row = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * words
    sums = ()
    for _ in tl.static_range(4 * TOKENS):
        sums = sums + (tl.zeros((ROWS, WORDS), tl.int32),)
    for step in range(0, words // WORDS):
        sums = row_step(sums, w_row, a_ptr, step, words, TOKENS, WORDS, False, ASM)
    if not EVEN:
        sums = row_step(sums, w_row, a_ptr, words // WORDS, words, TOKENS, WORDS, True, ASM)
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    for token in tl.static_range(TOKENS):
        total = sums[4 * token] + (sums[4 * token + 1] >> 2) + (sums[4 * token + 2] >> 4) + (sums[4 * token + 3] >> 6)
        exact = tl.sum(total, axis=1) - tl.load(a_sum_ptr + token)
        y = (exact.to(tl.float32) * tl.load(a_scale_ptr + token)) * w_scale
        tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def group_step(
    sums,
    w_row,
    scale_row,
    a_ptr,
    a_sum_ptr,
    step,
    words,
    groups,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
    ASM: tl.constexpr,
):
    """sums plus one tile of words, scaled. sums: a float32 tile [rows, WORDS] per token."""
    # A block of 128 inputs (8 words) has one scale, or two: one for planes 0 and 1, one for planes 2 and 3.
    PARTS: tl.constexpr = 2 if GROUP == 64 else 1
    SPAN: tl.constexpr = GROUP * PARTS // 16  # words between new scales
    t = tl.arange(0, WORDS)
    word = step * WORDS + t
    inside = word < words
    a_word = step * (4 * WORDS) + (t // 8) * 32 + t % 8
    q = load_words(w_row + word[None, :], inside[None, :], MASKED)
    block = step * (WORDS // SPAN) + t // SPAN if WORDS % SPAN == 0 else word // SPAN
    for part in tl.static_range(PARTS):
        group = block * PARTS + part
        scale = load_scales(scale_row + group[None, :], inside[None, :], MASKED)
        added = ()
        for token in tl.static_range(TOKENS):
            # The first word of a group carries the correction for all of it.
            bias = tl.load(a_sum_ptr + token * groups + group, mask=inside & (word % SPAN == 0), other=0)
            dot = tl.zeros(q.shape, tl.int32) - bias[None, :]
            for i in tl.static_range(4 // PARTS):
                plane = part * (4 // PARTS) + i
                a = load_activations(a_ptr + token * words * 4 + 8 * plane + a_word, inside, MASKED)
                x, u = tl.broadcast(a[None, :], (q >> (2 * plane)) & 0x03030303)
                dot = dp4a(u, x, dot, ASM)
            added = added + (sums[token] + dot.to(tl.float32) * scale,)
        sums = added
    return sums


@triton.jit
def gemv_group_kernel(
    a_ptr,  # int32 [TOKENS, K / 4]
    a_scale_ptr,  # float32 [TOKENS]
    a_sum_ptr,  # int32 [TOKENS, K / GROUP]
    w_ptr,  # int32 [N, K / 16]
    w_scale_ptr,  # float32 [N, K / GROUP]
    y_ptr,  # [TOKENS, N]
    N,
    words,
    groups,  # K / GROUP
    GROUP: tl.constexpr,  # 64, or a multiple of 128
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    WORDS: tl.constexpr,
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    w_row = w_ptr + row * words
    scale_row = w_scale_ptr + row * groups
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, WORDS), tl.float32),)
    for step in range(0, words // WORDS):
        sums = group_step(
            sums, w_row, scale_row, a_ptr, a_sum_ptr, step, words, groups, GROUP, TOKENS, WORDS, False, ASM
        )
    if not EVEN:
        step = words // WORDS
        sums = group_step(
            sums, w_row, scale_row, a_ptr, a_sum_ptr, step, words, groups, GROUP, TOKENS, WORDS, True, ASM
        )
    for token in tl.static_range(TOKENS):
        y = tl.sum(sums[token], axis=1) * tl.load(a_scale_ptr + token)
        tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


@triton.jit
def load_words(pointers, mask, MASKED: tl.constexpr):
    """Packed weights, each read once: they should not displace anything from the caches."""
    if MASKED:
        return tl.load(pointers, mask=mask, other=0, eviction_policy="evict_first")
    return tl.load(pointers, eviction_policy="evict_first")


@triton.jit
def load_activations(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    return tl.load(pointers)


@triton.jit
def load_scales(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.load(pointers)


def ternary_gemv(
    activations: QuantizedActivations,
    weight: PackedTernary,
    out_dtype: torch.dtype = torch.float32,
    configuration: GemvConfiguration | None = None,
) -> Tensor:
    """`reference.matmul.ternary_matmul` for one to four tokens: codes [..., K] to [..., N].

    Scales per row, or per group of 64 or of a multiple of 128 inputs. Raises Unsupported for more tokens.
    """
    codes, scale, _ = activations
    capability = require_device(codes, weight.packed)
    tokens = codes.numel() // weight.columns
    if tokens > GEMV_TOKENS:
        raise Unsupported(f"{tokens} tokens; the matrix-vector kernel takes {GEMV_TOKENS}")
    if out_dtype not in OUTPUT_DTYPES:
        raise Unsupported(f"output of {out_dtype}")
    require_group(weight)
    grouped = weight.n_groups > 1
    configuration = configuration or gemv_configuration(capability, max(tokens, 1), weight.rows, weight.columns)
    y = torch.empty((*codes.shape[:-1], weight.rows), dtype=out_dtype, device=codes.device)
    words = weight.columns // CODES_PER_WORD
    arguments = {
        "a_ptr": codes.contiguous().view(torch.int32),
        "a_scale_ptr": scale.contiguous(),
        "a_sum_ptr": sums_per_scale(activations, weight),
        "w_ptr": weight.packed.view(torch.int32),
        "w_scale_ptr": weight.scales,
        "y_ptr": y,
        "N": weight.rows,
        "words": words,
    }
    constants = {
        "TOKENS": tokens,
        "ROWS": configuration.rows,
        "WORDS": configuration.words,
        "EVEN": words % configuration.words == 0,
        "ASM": inline_assembly(),
    }
    if grouped:
        arguments["groups"] = weight.n_groups
        constants["GROUP"] = weight.group
    weights = configuration.rows * configuration.words * CODES_PER_WORD
    launch(
        Launch(
            gemv_group_kernel if grouped else gemv_row_kernel,
            (cdiv(weight.rows, configuration.rows) if tokens else 0,),
            arguments,
            constants,
            configuration.num_warps,
            weights=weights,
            multiplies=weights * tokens,
        )
    )
    return y


def require_group(weight: PackedTernary) -> None:
    """Raise Unsupported unless the groups are 64 or a multiple of 128 inputs: a block of bytes holds 128."""
    if weight.n_groups > 1 and weight.group != MIN_GROUP and weight.group % 128:
        raise Unsupported(f"groups of {weight.group} inputs; the kernels take {MIN_GROUP} and multiples of 128")
