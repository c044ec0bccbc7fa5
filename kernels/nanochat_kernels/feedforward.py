"""The ternary SwiGLU feed-forward (arXiv:2002.05202) in training, as one operation.

    h = silu(Q(x) · W_gateᵀ) · (Q(x) · W_upᵀ),   y = Q(h) · W_downᵀ

`swiglu_feed_forward_reference` is the definition, composed of `bit_linear`. `swiglu_feed_forward` has the same bits
and gradients (straight through both quantisations), but its own backward pass: it saves only gate, up and int8 codes,
and with filtered rows everything between its two ends is computed for the kept rows only.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import silu

from nanochat_kernels.bit_linear import Form, QuantizedInput, bit_linear, codes_of, product_dtype, quantize_input
from nanochat_kernels.kept_rows import KeptRows, kept_index, scatter_rows
from nanochat_kernels.linear_products import (
    PARTS,
    Backward,
    LinearWeight,
    gradient_operand,
    linear_gradients,
    linear_product,
    weights_of,
)


def swiglu_feed_forward_reference(
    x: QuantizedInput, latents: Sequence[Tensor], weights: Sequence[LinearWeight], form: Form = "float"
) -> Tensor:
    """The definition of `swiglu_feed_forward`, with nothing filtered."""
    gate, up = (bit_linear(x, latents[i], weights[i]) for i in (0, 1))
    return bit_linear(quantize_input(silu(gate) * up, form), latents[2], weights[2])


def swiglu_feed_forward(
    x: QuantizedInput,
    latents: Sequence[Tensor],
    weights: Sequence[LinearWeight],
    form: Form = "float",
    kept: KeptRows | None = None,
    backward: Backward = "exact",
) -> Tensor:
    """y: [..., C] to [..., C], in the autocast dtype or that of x. latents, weights: of gate, up and down.

    form: how the product with W_down is computed. kept, backward: as for `bit_linear`.
    """
    rows, count, known = (None, None, False) if kept is None else kept
    codes, scale, saved = x.codes, x.scale, x.saved or (None, None)
    fixed = (x.x, codes, scale, *saved, rows, count, known, product_dtype(x.x), form, backward)
    arguments = (*fixed, *latents, *(part for weight in weights for part in weight))
    return SwiGLUFunction.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu_feed_forward` with its gradients. rest: three latents, then the parts of three weights."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        saved_codes: Tensor | None,
        saved_scale: Tensor | None,
        rows: Tensor | None,
        count: Tensor | None,
        known: bool,
        dtype: torch.dtype,
        form: Form,
        backward: Backward,
        *rest: Any,
    ) -> Tensor:
        latents, weights = rest[:3], weights_of(rest[3:])
        gate, up = (linear_product(codes, scale, weight, dtype) for weight in weights[:2])
        h_codes, h_scale = codes_of(silu(gate) * up, form, dtype)
        y = linear_product(h_codes, h_scale, weights[2], dtype)
        held = [t.flatten(0, -2) for t in (codes, scale, gate, up, h_codes, h_scale)]
        ctx.gathered = False
        if known and rows is not None and count is not None:
            index = kept_index(rows, count)
            if index is not None and saved_codes is not None:
                held = [saved_codes, saved_scale, *(tensor.index_select(0, index) for tensor in held[2:])]
                ctx.gathered = True
        operands, w_scales = [gradient_operand(w) for w in weights], [w.w_scale for w in weights]
        ctx.save_for_backward(*held, rows, count, *operands, *w_scales)
        ctx.backward, ctx.dtypes, ctx.shape = backward, (x.dtype, latents[0].dtype, dtype), x.shape
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        held, (rows, count), operands, w_scales = saved[:6], saved[6:8], saved[8:11], saved[11:]
        x_dtype, latent_dtype, dtype = ctx.dtypes
        dy = grad_outputs[0].reshape(-1, grad_outputs[0].shape[-1])
        if rows is None:
            dx, *dws = swiglu_gradients(dy, held, operands, w_scales, dtype, ctx.backward)
        else:
            arguments = (dy, list(held), list(operands), list(w_scales), rows, count, dtype, ctx.backward, ctx.gathered)
            dx, *dws = _kept_swiglu_gradients(*arguments)
        dws = (dw.to(latent_dtype) for dw in dws)
        return dx.reshape(ctx.shape).to(x_dtype), *(None,) * 10, *dws, *(None,) * (3 * PARTS)


def swiglu_gradients(
    dy: Tensor,
    held: Sequence[Tensor],
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    dtype: torch.dtype,
    backward: Backward,
) -> list[Tensor]:
    """dx [M, C] and dw of gate, up and down; dy [M, C], held: codes, scale, gate, up, codes of h and their scale."""
    codes, scale, gate, up, h_codes, h_scale = held
    dh, dw_down = linear_gradients([dy], h_codes, h_scale, operands[2:], w_scales[2:], dtype, backward)
    assert dh is not None
    dgate, dup = torch.ops.aten.silu_backward(dh * up, gate), dh * silu(gate)
    dx, dws = linear_gradients([dgate, dup], codes, scale, operands[:2], w_scales[:2], dtype, backward)
    assert dx is not None
    return [dx, *dws, *dw_down]


@torch.library.custom_op("nanochat::kept_swiglu_gradients", mutates_args=())
def _kept_swiglu_gradients(
    dy: Tensor,
    held: list[Tensor],
    operands: list[Tensor],
    w_scales: list[Tensor | None],
    rows: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    backward: str,
    gathered: bool,
) -> list[Tensor]:
    """`swiglu_gradients` of the kept rows; dx has zeros in the others. gathered: held has only kept rows already."""
    index = kept_index(rows, count)
    kept = held
    if index is not None:
        dy = dy.index_select(0, index)
        kept = held if gathered else [tensor.index_select(0, index) for tensor in held]
    dx, *dws = swiglu_gradients(dy, kept, operands, w_scales, dtype, cast(Backward, backward))
    return [scatter_rows(dx, index, len(rows)), *(dw.to(dtype) for dw in dws)]


@_kept_swiglu_gradients.register_fake
def _(dy, held, operands, w_scales, rows, count, dtype, backward, gathered):
    dx = dy.new_empty(len(rows), operands[0].shape[1], dtype=dtype)
    return [dx, *(operand.new_empty(operand.shape, dtype=dtype) for operand in operands)]
