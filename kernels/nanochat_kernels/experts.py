"""Ternary products of a mixture of experts: rows sorted by expert, one grouped matrix product for all of them.

    y[r] = Q(x)[r] · W_eᵀ,  e the expert of row r        x: [R, K], weight: [E · N, K], counts: int64 [E], Σ = R

`grouped_bit_linear_reference` is the definition, one expert at a time; `grouped_bit_linear` is one call of
torch's grouped product forward and two backward, without reading the counts on the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from nanochat_kernels.bit_linear import QuantizedInput, bit_linear, product_dtype
from nanochat_kernels.kept_rows import kept_index, scatter_rows
from nanochat_kernels.linear_products import LinearWeight


class KeptAssignments(NamedTuple):
    """tokens: int64 [R], the token of each sorted row; rows, n_kept: as in KeptRows, of tokens.

    Every token has the same number of rows, so the number of kept rows follows from that of kept tokens.
    """

    tokens: Tensor
    rows: Tensor
    n_kept: Tensor


def grouped_bit_linear(
    x: QuantizedInput | Tensor,
    latent: Tensor,
    weight: LinearWeight,
    counts: Tensor,
    experts: Tensor,
    kept: "KeptAssignments | None" = None,
) -> Tensor:
    """[R, N] in the autocast dtype or that of x; gradients straight through to x and `latent`.

    x: [R, K], rows of one expert together; latent: float32 [E · N, K]; counts: int64 [E]; experts: int64 [R], the
    expert of each row. kept: tokens that take part in the backward pass; rows of others have gradient 0.
    """
    source, codes, scale = x[:3] if isinstance(x, QuantizedInput) else (x, x.detach(), None)
    fixed = (source, latent, codes, scale, weight.operand, weight.w_scale, counts, experts)
    arguments = (*fixed, *(kept or (None, None, None)), product_dtype(source))
    return _GroupedBitLinear.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


def grouped_bit_linear_reference(
    x: QuantizedInput | Tensor, latent: Tensor, weight: LinearWeight, counts: Tensor, experts: Tensor
) -> Tensor:
    """The definition of `grouped_bit_linear`."""
    del experts
    n_experts = len(counts)
    n = latent.shape[0] // n_experts
    outputs, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        rows, own = slice(start, start + count), slice(expert * n, (expert + 1) * n)
        start += count
        part = QuantizedInput(x.x[rows], x.codes[rows], x.scale[rows]) if isinstance(x, QuantizedInput) else x[rows]
        scale = weight.w_scale
        scale = scale[own] if scale is not None and len(scale) > 1 else scale
        outputs.append(bit_linear(part, latent[own], LinearWeight(weight.operand[own], scale)))
    return torch.cat(outputs)


class _GroupedBitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        latent: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        operand: Tensor,
        w_scale: Tensor | None,
        counts: Tensor,
        experts: Tensor,
        tokens: Tensor | None,
        rows: Tensor | None,
        count: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        offsets = counts.cumsum(0).to(torch.int32)
        stack = operand.to(dtype).unflatten(0, (len(counts), -1))
        y = _grouped_product(codes.to(dtype), stack.mT, offsets).float()
        rows_scale = _scale_of_rows(w_scale, len(counts), experts)
        for factor in (scale, rows_scale):
            if factor is not None:
                y = y * factor
        ctx.save_for_backward(codes, scale, operand, w_scale, offsets, experts, tokens, rows, count)
        ctx.dtypes = x.dtype, latent.dtype, dtype
        return y.to(dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, operand, w_scale, offsets, experts, tokens, rows, count = ctx.saved_tensors
        x_dtype, latent_dtype, dtype = ctx.dtypes
        wants = tuple(ctx.needs_input_grad[:2])
        arguments = (grad_outputs[0].contiguous(), codes, scale, operand, w_scale, offsets, experts)
        if rows is None:
            dx, dlatent = grouped_gradients(*arguments, dtype, wants)
        else:
            dx, dlatent = _kept_grouped_gradients(*arguments, tokens, rows, count, dtype, *wants)
        dx = dx.to(x_dtype) if wants[0] and dx is not None else None
        dlatent = dlatent.flatten(0, 1).to(latent_dtype) if wants[1] and dlatent is not None else None
        return dx, dlatent, *(None,) * 10


def grouped_gradients(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    operand: Tensor,
    w_scale: Tensor | None,
    offsets: Tensor,
    experts: Tensor,
    dtype: torch.dtype,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """dx [R, K] and dw [E, N, K], or None for what is not wanted."""
    n_experts = len(offsets)
    dx = dlatent = None
    if wants[0]:
        rows_scale = _scale_of_rows(w_scale, n_experts, experts)
        scaled = (dy if rows_scale is None else dy * rows_scale).to(dtype)
        dx = _grouped_product(scaled, operand.to(dtype).unflatten(0, (n_experts, -1)), offsets)
    if wants[1]:
        scaled = (dy if scale is None else dy * scale).to(dtype)
        dlatent = _grouped_product(scaled.mT, codes.to(dtype), offsets)
    return dx, dlatent


@torch.library.custom_op("nanochat::kept_grouped_gradients", mutates_args=())
def _kept_grouped_gradients(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    operand: Tensor,
    w_scale: Tensor | None,
    offsets: Tensor,
    experts: Tensor,
    tokens: Tensor,
    rows: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    wants_x: bool,
    wants_w: bool,
) -> tuple[Tensor, Tensor]:
    """`grouped_gradients` of the rows of kept tokens; dx has zeros in the others; [0] for what is not wanted."""
    index = kept_index(rows, count)
    total = len(dy)
    places = None
    if index is not None:
        keep = torch.zeros(len(rows), dtype=torch.bool, device=dy.device).index_fill_(0, index, True)[tokens]
        places = torch.nonzero_static(keep, size=len(index) * (total // len(rows))).squeeze(1)
        offsets = keep.cumsum(0)[(offsets.long() - 1).clamp(min=0)].where(offsets > 0, 0).to(torch.int32)
        dy, codes, experts = dy[places], codes[places], experts[places]
        scale = None if scale is None else scale[places]
    dx, dlatent = grouped_gradients(dy, codes, scale, operand, w_scale, offsets, experts, dtype, (wants_x, wants_w))
    dx = None if dx is None else scatter_rows(dx, places, total)
    return dy.new_empty(0) if dx is None else dx, dy.new_empty(0) if dlatent is None else dlatent


@_kept_grouped_gradients.register_fake
def _(dy, codes, scale, operand, w_scale, offsets, experts, tokens, rows, count, dtype, wants_x, wants_w):
    dx = dy.new_empty(len(dy), operand.shape[1], dtype=dtype) if wants_x else dy.new_empty(0)
    shape = (len(offsets), operand.shape[0] // len(offsets), operand.shape[1])
    return dx, operand.new_empty(shape, dtype=dtype) if wants_w else dy.new_empty(0)


@torch.library.custom_op("nanochat::grouped_product", mutates_args=())
def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """torch's grouped product as one node of a graph: its own shape function takes only bfloat16 (torch 2.13)."""
    return grouped_mm(left, right, offs=offsets)


@_grouped_product.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    if right.ndim == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])


def _scale_of_rows(w_scale: Tensor | None, n_experts: int, experts: Tensor) -> Tensor | None:
    """The factor on every element of a row: [R, N], one scale for all, or None."""
    if w_scale is None or len(w_scale) == 1:
        return w_scale
    return w_scale.unflatten(0, (n_experts, -1)).index_select(0, experts)
