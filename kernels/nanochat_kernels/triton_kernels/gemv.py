"""Decode: packed ternary weights times one to four tokens of int8, with dp4a (four multiply-adds per instruction).

A program computes a few outputs; its threads share out their 32-bit words of weights, 16 codes each. Codes stay
biased (w + 1), and the sum of the activations corrects the result, so that no weight is ever decremented.

One scale per row: no shifts either. Masks pick the planes where they lie, so that plane p counts 4^p times, and has its
own accumulator; four shifts at the very end make the sum exact. Scales per group: every word is shifted, corrected,
converted and scaled before it is added, because its scale is only known there.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.packed import PackedTernary
from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.triton_kernels.configurations import GemvConfiguration, gemv_configuration
from nanochat_kernels.triton_kernels.group_sums import sums_per_scale
from nanochat_kernels.triton_kernels.int8_matmul import OUTPUT_DTYPES
from nanochat_kernels.triton_kernels.language import dp4a
from nanochat_kernels.triton_kernels.launch import Launch, inline_assembly, launch, require_device

MAX_TOKENS = 4
CODES_PER_WORD = 16
MIN_GROUP = 64


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
    EVEN: tl.constexpr,
    ASM: tl.constexpr,
):
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, WORDS)
    # Word t of a row holds inputs 128 (t // 8) + 4 (t % 8) .. + 3 of plane 0; in words of activations, that is:
    a_word = (t // 8) * 32 + t % 8
    w_row = w_ptr + tl.minimum(n, N - 1).to(tl.int64)[:, None] * words
    sums = ()
    for _ in tl.static_range(4 * TOKENS):
        sums = sums + (tl.zeros((ROWS, WORDS), tl.int32),)
    for step in range(0, tl.cdiv(words, WORDS)):
        if EVEN:
            q = tl.load(w_row + (step * WORDS + t)[None, :], eviction_policy="evict_first")
        else:
            inside = step * WORDS + t < words
            q = tl.load(
                w_row + (step * WORDS + t)[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first"
            )
        added = ()
        for token in tl.static_range(TOKENS):
            for plane in tl.static_range(4):
                address = a_ptr + token * words * 4 + step * (4 * WORDS) + 8 * plane + a_word
                if EVEN:
                    a = tl.load(address)
                else:
                    a = tl.load(address, mask=inside, other=0)
                if plane == 3:
                    codes = q & -1061109568  # 0xC0C0C0C0
                else:
                    codes = q & (0x03030303 << (2 * plane))
                x, u = tl.broadcast(a[None, :], codes)
                added = added + (dp4a(u, x, sums[4 * token + plane], ASM),)
        sums = added
    w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0.0)
    for token in tl.static_range(TOKENS):
        total = sums[4 * token] + (sums[4 * token + 1] >> 2) + (sums[4 * token + 2] >> 4) + (sums[4 * token + 3] >> 6)
        exact = tl.sum(total, axis=1) - tl.load(a_sum_ptr + token)
        y = (exact.to(tl.float32) * tl.load(a_scale_ptr + token)) * w_scale
        tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


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
    # A block of 128 inputs (8 words) has one scale, or two: one for planes 0 and 1, one for planes 2 and 3.
    PARTS: tl.constexpr = 2 if GROUP == 64 else 1
    SPAN: tl.constexpr = GROUP * PARTS // 16  # words between new scales
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t = tl.arange(0, WORDS)
    a_word = (t // 8) * 32 + t % 8
    row = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    w_row = w_ptr + row * words
    scale_row = w_scale_ptr + row * groups
    sums = ()
    for _ in tl.static_range(TOKENS):
        sums = sums + (tl.zeros((ROWS, WORDS), tl.float32),)
    for step in range(0, tl.cdiv(words, WORDS)):
        word = step * WORDS + t
        inside = word < words
        if EVEN:
            q = tl.load(w_row + word[None, :], eviction_policy="evict_first")
        else:
            q = tl.load(w_row + word[None, :], mask=inside[None, :], other=0, eviction_policy="evict_first")
        if WORDS % SPAN == 0:
            block = step * (WORDS // SPAN) + t // SPAN
        else:
            block = word // SPAN
        added = ()
        for token in tl.static_range(TOKENS):
            added = added + (sums[token],)
        for part in tl.static_range(PARTS):
            group = block * PARTS + part
            if EVEN:
                scale = tl.load(scale_row + group[None, :])
            else:
                scale = tl.load(scale_row + group[None, :], mask=inside[None, :], other=0.0)
            scaled = ()
            for token in tl.static_range(TOKENS):
                # The first word of a group carries the correction for all of it.
                first = inside & (word % SPAN == 0)
                bias = tl.load(a_sum_ptr + token * groups + group, mask=first, other=0)
                dot = tl.zeros((ROWS, WORDS), tl.int32) - bias[None, :]
                for i in tl.static_range(4 // PARTS):
                    plane: tl.constexpr = part * 2 + i
                    address = a_ptr + token * words * 4 + step * (4 * WORDS) + 8 * plane + a_word
                    if EVEN:
                        a = tl.load(address)
                    else:
                        a = tl.load(address, mask=inside, other=0)
                    x, u = tl.broadcast(a[None, :], (q >> (2 * plane)) & 0x03030303)
                    dot = dp4a(u, x, dot, ASM)
                scaled = scaled + (added[token] + dot.to(tl.float32) * scale,)
            added = scaled
        sums = added
    for token in tl.static_range(TOKENS):
        y = tl.sum(sums[token], axis=1) * tl.load(a_scale_ptr + token)
        tl.store(y_ptr + token * N + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


def ternary_gemv(
    activations: QuantizedActivations,
    weight: PackedTernary,
    out_dtype: torch.dtype = torch.float32,
    configuration: GemvConfiguration | None = None,
) -> Tensor:
    """`reference.matmul.ternary_matmul` for one to four tokens: codes [..., K] to [..., N].

    Scales per row, or per group of 64 or of a multiple of 128 inputs. Unsupported for more tokens.
    """
    codes, scale, _ = activations
    capability = require_device(codes, weight.packed)
    tokens = codes.numel() // weight.columns
    if tokens > MAX_TOKENS:
        raise Unsupported(f"{tokens} tokens; the matrix-vector kernel takes {MAX_TOKENS}")
    if out_dtype not in OUTPUT_DTYPES:
        raise Unsupported(f"output of {out_dtype}")
    require_group(weight)
    grouped = weight.n_groups > 1
    configuration = configuration or gemv_configuration(capability, grouped, tokens, weight.rows, weight.columns)
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
            (triton.cdiv(weight.rows, configuration.rows) if tokens else 0,),
            arguments,
            constants,
            configuration.num_warps,
            weights=weights,
            multiplies=weights * tokens,
        )
    )
    return y


def require_group(weight: PackedTernary) -> None:
    """Unsupported when the groups are not 64 or a multiple of 128 inputs: a block of bytes holds 128."""
    if weight.n_groups > 1 and weight.group != MIN_GROUP and weight.group % 128:
        raise Unsupported(f"groups of {weight.group} inputs; the kernels take {MIN_GROUP} and multiples of 128")
