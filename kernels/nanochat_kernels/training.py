"""The ternary linear layer in training: an exact integer product forward, straight-through gradients backward.

    y  = (codes · weight_codesᵀ · a_scale) · w_scale        codes: int8 activations, weight_codes in {-1, 0, 1}
    dx = (dy · w_scale) · weight_codes                      (arXiv:2402.17764, straight-through for both roundings)
    dw = (dy · a_scale)ᵀ · codes

Both forms of the forward compute the same integers, in float32 the same bits: `float` multiplies the codes as floats
(exact below 2²⁴, that is up to 132104 inputs) and leaves rounding and scaling to whoever fuses elementwise code;
`int8` multiplies packed weights with int8 and keeps int8 for the backward pass, a quarter of the memory.

Activations and weights are quantised by the caller: the weights once per optimizer step.

Rows can be left out of the backward pass: dx[kept] = dy[kept] · W, dw = dy[kept]ᵀ · x[kept], smaller dense products.
"""

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.kept_rows import KeptRows, kept_index
from nanochat_kernels.operations import ternary_matmul
from nanochat_kernels.packed import PackedTernary
from nanochat_kernels.reference.activations import QuantizedActivations, codes_and_scale, group_sums

Form = Literal["float", "int8"]
GradInput = Literal["exact", "fp8"]
FP8 = torch.float8_e4m3fn
MAX_INPUTS = 2**24 // 127
"""Beyond this many inputs a float32 sum of codes may round."""
MEASURED_FORMS = "training_forms.json"


class QuantizedInput(NamedTuple):
    """An input that several layers share. x: [..., K], receives the gradient; codes: [..., K]; scale: float32 [..., 1].

    codes are integers in int8 (form `int8`) or in the dtype that is multiplied in. saved: what the backward pass needs,
    codes and scale of the kept rows, where those are known before; else None.
    """

    x: Tensor
    codes: Tensor
    scale: Tensor
    saved: tuple[Tensor, Tensor] | None = None


class LinearWeight(NamedTuple):
    """A quantised weight in the forms that training multiplies with.

    operand: float32 [N, K]; w_scale: float32 [N] or None. One scale a row: codes and their scale; groups: codes · scale
    and None. packed (form `int8`): uint8 [N, K / 4] and scales float32 [N, G]; else None.
    """

    operand: Tensor
    w_scale: Tensor | None
    packed: Tensor | None = None
    scales: Tensor | None = None


def quantize_input(x: Tensor, form: Form = "float", kept: KeptRows | None = None) -> QuantizedInput:
    """int8 quantisation per token, without a gradient of its own: `bit_linear` sends it to x. x: float [..., K]."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    codes, scale = codes_and_scale(x.detach())
    codes = codes.to(torch.int8 if form == "int8" else dtype)
    index = kept.chosen if kept is not None and kept.known else None
    saved = None if index is None else (codes.flatten(0, -2)[index], scale.reshape(-1, 1)[index])
    return QuantizedInput(x, codes, scale, saved)


def bit_linear(
    x: QuantizedInput | Tensor,
    latent: Tensor,
    weight: LinearWeight,
    kept: KeptRows | None = None,
    grad_input: GradInput = "exact",
) -> Tensor:
    """y = Q(x) · Wᵀ: [..., K] to [..., N], in the autocast dtype or that of x; the weight's gradient goes to `latent`.

    A plain tensor is multiplied as it is. latent: float32 [N, K]. kept: rows of the flattened input that take
    part in the backward pass, dx[kept] = dy[kept] · W and dw = dy[kept]ᵀ · x[kept]; the others have gradient 0.
    grad_input: `fp8` computes dx with dy in float8_e4m3fn, scaled per row, and W exact in it; for one scale a row.
    """
    if isinstance(x, QuantizedInput):
        dtype = torch.get_autocast_dtype(x.x.device.type) if torch.is_autocast_enabled(x.x.device.type) else x.x.dtype
        return _apply(x.x, latent, x.codes, x.scale, weight, kept, dtype, grad_input, x.saved)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _apply(x, latent, x.detach(), None, weight, kept, x.dtype, grad_input)


def choose_form(device: torch.device, in_features: int, out_features: int) -> Form:
    """The form that was measured faster, forward and backward, for the nearest shape on such a device.

    `float` where nothing was measured: today on every GPU (benchmarks/bitlinear_forms.py measures).
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


def _apply(
    x: Tensor,
    latent: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    weight: LinearWeight,
    kept: KeptRows | None,
    dtype: torch.dtype,
    grad_input: GradInput,
    saved: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    fp8 = grad_input == "fp8" and weight.w_scale is not None
    rows, count = (None, None) if kept is None else (kept.rows, kept.n_kept)
    arguments = (x, latent, codes, scale, *weight, rows, count, *(saved or (None, None)), dtype, fp8)
    return BitLinearFunction.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


class BitLinearFunction(torch.autograd.Function):
    """`bit_linear` with its gradients; arguments as QuantizedInput and LinearWeight hold them."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        latent: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        operand: Tensor,
        w_scale: Tensor | None,
        packed: Tensor | None,
        scales: Tensor | None,
        rows: Tensor | None,
        count: Tensor | None,
        saved_codes: Tensor | None,
        saved_scale: Tensor | None,
        dtype: torch.dtype,
        fp8: bool,
    ) -> Tensor:
        ctx.fp8, ctx.gathered = fp8, saved_codes is not None
        held = (codes, scale) if saved_codes is None else (saved_codes, saved_scale)
        ctx.save_for_backward(*held, operand, w_scale, rows, count)
        ctx.dtypes = x.dtype, latent.dtype, dtype
        if codes.dtype == torch.int8 and packed is not None and scales is not None and scale is not None:
            return _packed_product(codes, scale, packed, scales, dtype)
        y = torch.nn.functional.linear(codes.to(dtype), operand.to(dtype)).to(torch.float32)
        for factor in (scale, w_scale):
            if factor is not None:
                y.mul_(factor)  # in place: it is ours, or a copy in float32 of what is
        return y.to(dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, operand, w_scale, rows, count = ctx.saved_tensors
        x_dtype, latent_dtype, dtype = ctx.dtypes
        n, k = operand.shape
        dy, codes = grad_outputs[0].reshape(-1, n), codes.reshape(-1, k)
        scale = None if scale is None else scale.reshape(-1, 1)
        wants = tuple(ctx.needs_input_grad[:2])
        if rows is None:
            dx, dlatent = linear_gradients(dy, codes, scale, operand, w_scale, dtype, ctx.fp8, wants)
        else:
            arguments = (dy, codes, scale, operand, w_scale, rows, count, dtype, ctx.fp8, *wants, ctx.gathered)
            dx, dlatent = _kept_gradients(*arguments)
        dx = dx.reshape(*grad_outputs[0].shape[:-1], k).to(x_dtype) if wants[0] and dx is not None else None
        dlatent = dlatent.to(latent_dtype) if wants[1] and dlatent is not None else None
        return dx, dlatent, *(None,) * 12


def linear_gradients(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    operand: Tensor,
    w_scale: Tensor | None,
    dtype: torch.dtype,
    fp8: bool,
    wants: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """dx [M, K] and dw [N, K], those that are wanted; dy [M, N], codes [M, K], scale [M, 1], operand [N, K]."""
    dx = dlatent = None
    if wants[0]:
        scaled = dy if w_scale is None else dy * w_scale
        dx = fp8_product(scaled, operand) if fp8 else scaled.to(dtype) @ operand.to(dtype)
    if wants[1]:
        scaled = (dy if scale is None else dy * scale).to(dtype)
        dlatent = scaled.T @ codes.to(dtype)
    return dx, dlatent


@torch.library.custom_op("nanochat::kept_gradients", mutates_args=())
def _kept_gradients(
    dy: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    operand: Tensor,
    w_scale: Tensor | None,
    rows: Tensor,
    count: Tensor,
    dtype: torch.dtype,
    fp8: bool,
    wants_x: bool,
    wants_w: bool,
    gathered: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_gradients` of the kept rows; dx is [M, K] with zeros in the others, and [0] for what is not wanted.

    gathered: codes and scale are of the kept rows already.
    """
    index = kept_index(rows, count)
    total = len(dy)
    if index is not None:
        dy = dy[index]
        if not gathered:
            codes, scale = codes[index], None if scale is None else scale[index]
    dx, dlatent = linear_gradients(dy, codes, scale, operand, w_scale, dtype, fp8, (wants_x, wants_w))
    if dx is not None and index is not None:
        dx = dx.new_zeros(total, dx.shape[1]).index_copy_(0, index, dx)
    return dy.new_empty(0) if dx is None else dx, dy.new_empty(0) if dlatent is None else dlatent


@_kept_gradients.register_fake
def _(dy, codes, scale, operand, w_scale, rows, count, dtype, fp8, wants_x, wants_w, gathered):
    dx = dy.new_empty(len(dy), operand.shape[1], dtype=torch.bfloat16 if fp8 else dtype) if wants_x else dy.new_empty(0)
    return dx, operand.new_empty(operand.shape, dtype=dtype) if wants_w else dy.new_empty(0)


def fp8_product(dy: Tensor, weight_codes: Tensor) -> Tensor:
    """dy · W in bfloat16, dy [M, N] rounded to float8_e4m3fn with a scale per row, W [N, K] in {-1, 0, 1}, exact.

    N and K must be multiples of 16. What the tensor cores of compute capability 8.9 and later do in hardware.
    """
    scale = dy.abs().amax(dim=1, keepdim=True).to(torch.float32).clamp(min=1e-30) / torch.finfo(FP8).max
    columns = torch.ones(1, weight_codes.shape[1], device=dy.device)
    weight = weight_codes.to(FP8).T.contiguous().T  # the second operand must be column-major
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] - public only from torch 2.13 on
    return product((dy / scale).to(FP8), weight, scale, columns, out_dtype=torch.bfloat16)


@torch.library.custom_op("nanochat::packed_product", mutates_args=())
def _packed_product(codes: Tensor, scale: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`operations.ternary_matmul` as one node of a compiled graph: codes int8 [..., K] to [..., N]."""
    weight = PackedTernary(packed, scales, packed.shape[1] * 4)
    return ternary_matmul(QuantizedActivations(codes, scale, group_sums(codes, weight.group)), weight, dtype)


@_packed_product.register_fake
def _(codes: Tensor, scale: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], packed.shape[0], dtype=dtype)
