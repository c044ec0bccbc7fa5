"""The ternary linear layer in training: an exact integer product forward, straight-through gradients backward.

    y  = (codes · weight_codesᵀ · a_scale) · w_scale        codes: int8 activations, weight_codes in {-1, 0, 1}
    dx = (dy · w_scale) · weight_codes                      (arXiv:2402.17764, straight-through for both roundings)
    dw = (dy · a_scale)ᵀ · codes

Both forms of the forward pass compute the same integers, and in float32 the same bits: `float` multiplies the codes as
floats (exact below 2²⁴, that is up to 132104 inputs) and leaves rounding and scaling to a compiler that fuses
elementwise code; `int8` multiplies packed weights by int8 and keeps int8 for the backward pass, a quarter of the bytes.

NVFP4 (`nanochat_kernels.four_bit`) has other codes of activations, in four bits, and the same gradients of them.

The caller quantises activations and weights: the weights once per optimizer step.

Rows can be left out of the backward pass: dx[kept] = dy[kept] · W, dw = dy[kept]ᵀ · x[kept], smaller dense products.
"""

import json
import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from nanochat_kernels.four_bit import FOUR_BIT, FourBit, four_bit_codes
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
from nanochat_kernels.reference.activations import codes_and_scale

Form = Literal["float", "int8"] | FourBit
MAX_INPUTS = 2**24 // 127
"""Beyond this many inputs a float32 sum of codes may round."""
MEASURED_FORMS = "training_forms.json"


class QuantizedInput(NamedTuple):
    """An input that several layers share. x: [..., K], receives the gradient; codes: [..., K]; scale: float32 [..., 1].

    codes are integers in int8 (form `int8`) or in the dtype of the product; NVFP4's are bytes, or emulated values in
    that dtype. saved: codes and scale of the kept rows for the backward pass, if those are known before the forward
    pass; else None.
    """

    x: Tensor
    codes: Tensor
    scale: Tensor
    saved: tuple[Tensor, Tensor] | None = None


def product_dtype(x: Tensor) -> torch.dtype:
    """The autocast dtype, or that of x."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def quantize_input(x: Tensor, form: Form = "float", kept: KeptRows | None = None) -> QuantizedInput:
    """Codes of tokens as `form` multiplies them; `bit_linear` sends the gradient straight to x. x: float [..., K]."""
    codes, scale = codes_of(x.detach(), form, product_dtype(x))
    index = kept.chosen if kept is not None and kept.known else None
    saved = None if index is None else (codes.flatten(0, -2)[index], scale.reshape(-1, 1)[index])
    return QuantizedInput(x, codes, scale, saved)


def codes_of(x: Tensor, form: Form, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scale of activations as `form` multiplies them, by products in dtype."""
    if form in FOUR_BIT:
        return four_bit_codes(x, form, dtype)
    codes, scale = codes_and_scale(x)
    return codes.to(torch.int8 if form == "int8" else dtype), scale


def bit_linear(
    x: QuantizedInput | Tensor,
    latent: Tensor,
    weight: LinearWeight,
    kept: KeptRows | None = None,
    backward: Backward = "exact",
) -> Tensor:
    """y = Q(x) · Wᵀ: [..., K] to [..., N], in the autocast dtype or that of x; the weight's gradient goes to `latent`.

    A plain tensor is multiplied as it is. latent: float32 [N, K]. kept: rows of the flattened input that take
    part in the backward pass, dx[kept] = dy[kept] · W and dw = dy[kept]ᵀ · x[kept]; the others have gradient 0.
    backward: number format of the gradients' products, for layers with one scale per row (else exact, or bf16).
    """
    return bit_linears(x, (latent,), (weight,), kept, backward)[0]


def bit_linears(
    x: QuantizedInput | Tensor,
    latents: Sequence[Tensor],
    weights: Sequence[LinearWeight],
    kept: KeptRows | None = None,
    backward: Backward = "exact",
) -> tuple[Tensor, ...]:
    """`bit_linear` of several layers that read one input, whose gradient is summed in the products themselves."""
    source, codes, scale, saved = x if isinstance(x, QuantizedInput) else (x, None, None, None)
    dtype = product_dtype(source)
    if codes is None:
        source = source.to(dtype)
        codes = source.detach()
    rows, count = (None, None) if kept is None else (kept.rows, kept.n_kept)
    fixed = (source, codes, scale, *(saved or (None, None)), rows, count, dtype, backward, len(latents))
    arguments = (*fixed, *latents, *(part for weight in weights for part in weight))
    return BitLinearFunction.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


def choose_form(device: torch.device, in_features: int, out_features: int) -> Form:
    """The form that was measured faster, forward and backward, for the nearest shape on such a device.

    `float` if nothing was measured: today on every GPU (benchmarks/bitlinear_forms.py measures).
    """
    rows = [row for row in _measured() if row["device"] == device.type]
    if not rows or in_features % 128 or in_features > MAX_INPUTS:
        return "float"
    nearest = min(rows, key=lambda row: abs(math.log(row["in"] * row["out"] / (in_features * out_features))))
    return "int8" if nearest["int8_speedup"] > 1 else "float"


@cache
def _measured() -> list[dict[str, Any]]:
    """Rows of device, in, out, int8_speedup."""
    return json.loads(files("nanochat_kernels").joinpath(MEASURED_FORMS).read_text(encoding="utf-8"))["shapes"]


class BitLinearFunction(torch.autograd.Function):
    """`bit_linears` with its gradients. rest: n latents, then the parts of n weights."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        saved_codes: Tensor | None,
        saved_scale: Tensor | None,
        rows: Tensor | None,
        count: Tensor | None,
        dtype: torch.dtype,
        backward: Backward,
        n: int,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        latents, weights = rest[:n], weights_of(rest[n:])
        ctx.backward, ctx.gathered, ctx.n = backward, saved_codes is not None, n
        held = (codes, scale) if saved_codes is None else (saved_codes, saved_scale)
        operands, w_scales = [gradient_operand(w) for w in weights], [w.w_scale for w in weights]
        ctx.save_for_backward(*held, rows, count, *operands, *w_scales)
        ctx.dtypes, ctx.shape = (x.dtype, latents[0].dtype, dtype), x.shape
        return tuple(linear_product(codes, scale, weight, dtype) for weight in weights)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, rows, count, *rest = ctx.saved_tensors
        n, (x_dtype, latent_dtype, dtype) = ctx.n, ctx.dtypes
        operands, w_scales = rest[:n], rest[n:]
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in grad_outputs]
        codes, scale = codes.reshape(-1, codes.shape[-1]), None if scale is None else scale.reshape(-1, 1)
        wants_x, wants_w = ctx.needs_input_grad[0], any(ctx.needs_input_grad[10 : 10 + n])
        arguments = (dys, codes, scale, operands, w_scales)
        if rows is None:
            dx, dws = linear_gradients(*arguments, dtype, ctx.backward, (wants_x, wants_w))
            dws = dws or [None] * n
        else:
            dx, *dws = _kept_gradients(*arguments, rows, count, dtype, ctx.backward, ctx.gathered, wants_x, wants_w)
        dx = dx.reshape(ctx.shape).to(x_dtype) if wants_x and dx is not None else None
        dws = [dw.to(latent_dtype) if wants_w and dw is not None else None for dw in dws]
        return dx, *(None,) * 9, *dws, *(None,) * (PARTS * n)


@torch.library.custom_op("nanochat::kept_gradients", mutates_args=())
def _kept_gradients(
    dys: list[Tensor],
    codes: Tensor,
    scale: Tensor | None,
    operands: list[Tensor],
    w_scales: list[Tensor | None],
    rows: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    backward: str,
    gathered: bool,
    wants_x: bool,
    wants_w: bool,
) -> list[Tensor]:
    """dx [M, K], with zeros in the rows that are not kept, and the dw of kept rows; [0] for what is not wanted.

    gathered: codes and scale have only the kept rows already.
    """
    index, total = kept_index(rows, count), len(rows)
    if index is not None:
        dys = [dy.index_select(0, index) for dy in dys]
        if not gathered:
            codes, scale = codes.index_select(0, index), None if scale is None else scale.index_select(0, index)
    wants = (wants_x, wants_w)
    dx, dws = linear_gradients(dys, codes, scale, operands, w_scales, dtype, cast(Backward, backward), wants)
    dx = dys[0].new_empty(0) if dx is None else scatter_rows(dx, index, total)
    return [dx, *([dw.to(dtype) for dw in dws] or [dys[0].new_empty(0) for _ in dys])]


@_kept_gradients.register_fake
def _(dys, codes, scale, operands, w_scales, rows, count, dtype, backward, gathered, wants_x, wants_w):
    empty = dys[0].new_empty(0)
    dx = dys[0].new_empty(len(rows), operands[0].shape[1], dtype=dtype) if wants_x else empty
    return [dx, *(o.new_empty(o.shape, dtype=dtype) if wants_w else dys[0].new_empty(0) for o in operands)]
