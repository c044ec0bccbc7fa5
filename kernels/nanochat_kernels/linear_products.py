"""The products of a ternary linear layer in training: forward, and the gradients of its input and its weight.

    y  = (codes · weight_codesᵀ · a_scale) · w_scale
    dx = dy · (weight_codes · w_scale)
    dw = dyᵀ · (codes · a_scale)

Plain functions of tensors; `bit_linear` and `feedforward` decide which rows, and whose gradient it is. Ternary codes
and int8 activations are exact in every number format, so that a backward pass in a short one (`Backward`) rounds
nothing but dy: once by row for dx and once by column for dw, each with a scale of its own (as in arXiv:2304.13013).
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from nanochat_kernels.four_bit import four_bit_product
from nanochat_kernels.operations import int8_gradients, int8_matmul, quantize_gradient, ternary_matmul
from nanochat_kernels.reference import gradient as reference
from nanochat_kernels.reference.activations import LEVELS, QuantizedActivations, group_sums
from nanochat_kernels.reference.gradient import QuantizedGradient
from nanochat_kernels.reference.nvfp4 import nvfp4_values
from nanochat_kernels.reference.packed import PackedTernary

int8_product = torch._int_mm  # pyright: ignore[reportPrivateImportUsage] - it has no public name
FP8 = torch.float8_e4m3fn
Backward = Literal["exact", "bf16", "int8", "fp8"]
"""exact: in the dtype of the forward pass; fp8: dx in float8_e4m3fn, dw exact; bf16, int8: both."""


class LinearWeight(NamedTuple):
    """A quantised weight in the forms that training multiplies with.

    operand: [N, K]; w_scale: float32 [N] or None: with one scale per row, float32 or int8 codes and their scale; with
    groups, float32 codes · scale and None. packed: uint8 [N, K / 4], where the forward product is the packed one,
    and scales float32 [N, G]; [N, K / 2] in e2m1 for NVFP4; else None. transposed: int8 [K, N], a copy of int8 codes
    for gradients on CUDA.
    """

    operand: Tensor
    w_scale: Tensor | None
    packed: Tensor | None = None
    scales: Tensor | None = None
    transposed: Tensor | None = None


PARTS = len(LinearWeight._fields)


def weights_of(parts: Sequence[Tensor | None]) -> list[LinearWeight]:
    """Weights whose parts follow each other, as `torch.autograd.Function` takes them."""
    return [LinearWeight(*parts[i : i + PARTS]) for i in range(0, len(parts), PARTS)]  # pyright: ignore[reportArgumentType]


def gradient_operand(weight: LinearWeight) -> Tensor:
    """[N, K], laid out for the gradient of the input."""
    return weight.operand if weight.transposed is None else weight.transposed.T


def linear_product(codes: Tensor, scale: Tensor | None, weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    """y [..., N] in dtype; codes [..., K], which are int8 for the packed product; scale [..., 1]. Bytes are NVFP4."""
    if codes.dtype == torch.uint8:
        assert scale is not None
        assert weight.packed is not None
        assert weight.w_scale is not None
        return four_bit_product(codes, scale, weight.packed, weight.w_scale, dtype)
    in_int8 = codes.dtype == weight.operand.dtype == torch.int8
    if in_int8 and has_own_products(codes) and scale is not None and weight.w_scale is not None:
        return _int8_product(codes, scale, weight.operand, weight.w_scale, dtype)
    if codes.dtype == torch.int8 and weight.packed is not None and weight.scales is not None and scale is not None:
        return _packed_product(codes, scale, weight.packed, weight.scales, dtype)
    if in_int8:
        y = integer_product(codes.flatten(0, -2), weight.operand.T).to(torch.float32).view(*codes.shape[:-1], -1)
    else:
        y = torch.nn.functional.linear(codes.to(dtype), weight.operand.to(dtype)).to(torch.float32)
    for factor in (scale, weight.w_scale):
        if factor is not None:
            y.mul_(factor)  # in place: y is ours
    return y.to(dtype)


def linear_gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor | None,
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    dtype: torch.dtype,
    backward: Backward = "exact",
    wants: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, list[Tensor]]:
    """dx [M, K], the sum over the layers that read x, and dw [N_i, K] of each; None and none where not wanted.

    dys: [M, N_i]; codes [M, K] and their scale [M, 1]; operands [N_i, K]; w_scales [N_i] or None. dtype: that of the
    results, and of exact products; dw of integer products on CUDA is in float32.
    """
    if codes.dtype == torch.uint8:
        codes = nvfp4_values(codes).to(dtype)
    if backward == "int8" and scale is not None and all(w is not None for w in w_scales):
        if has_own_products(codes):
            found = _int8_gradients_on_cuda(dys, codes, scale, operands, w_scales, dtype, *wants)
            dxs, dws = (found[: len(dys)], found[len(dys) :]) if wants[0] else ([], found)
            dx = sum(part.to(torch.float32) for part in dxs)  # a compiler reads the parts where it reads the sum
            return dx.to(dtype) if isinstance(dx, Tensor) else None, dws
        dx, dws = _int8_gradients(dys, codes, scale.squeeze(1), operands, w_scales, wants)
    else:
        product = torch.bfloat16 if backward == "bf16" else dtype
        dx = _input_gradient(dys, operands, w_scales, product, backward) if wants[0] else None
        dws = _weight_gradients(dys, codes, scale, product, backward) if wants[1] else []
    return None if dx is None else dx.to(dtype), [dw.to(dtype) for dw in dws]


def has_own_products(x: Tensor) -> bool:
    """Whether int8 products there are our kernels', as nodes of a compiled graph, and not torch's."""
    return x.is_cuda


def _input_gradient(
    dys: Sequence[Tensor],
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    dtype: torch.dtype,
    backward: Backward,
) -> Tensor:
    """fp8: by `fp8_product`, for layers with one scale per row."""
    dx = None
    for dy, operand, w_scale in zip(dys, operands, w_scales, strict=True):
        if backward == "fp8" and w_scale is not None:
            part = fp8_product(dy * w_scale, operand)
            dx = part if dx is None else dx + part
            continue
        if w_scale is not None:  # scale the smaller of the two, or what is rounded anyway
            if dy.shape[0] > operand.shape[1] and backward != "bf16":
                operand = operand * w_scale.unsqueeze(1)
            else:
                dy = dy * w_scale
        dy, operand = dy.to(dtype), operand.to(dtype)
        dx = dy @ operand if dx is None else torch.addmm(dx, dy, operand, out=dx)
    assert dx is not None, "no layer"
    return dx


def _weight_gradients(
    dys: Sequence[Tensor], codes: Tensor, scale: Tensor | None, dtype: torch.dtype, backward: Backward
) -> list[Tensor]:
    fewer = codes.dtype == torch.int8 or codes.shape[1] <= sum(dy.shape[1] for dy in dys)
    if scale is not None and backward != "bf16" and fewer:
        codes, scale = codes * scale, None
    codes = codes.to(dtype)
    return [(dy if scale is None else dy * scale).to(dtype).T @ codes for dy in dys]


def _int8_gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor,
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor | None],
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, list[Tensor]]:
    """Integer products in float32: only the gradient of the output is rounded, once for each of the two."""
    dx: Tensor | None = None
    dws: list[Tensor] = []
    codes, levels = codes.to(torch.int8), column_levels(codes.device)
    for dy, operand, w_scale in zip(dys, operands, w_scales, strict=True):
        assert w_scale is not None
        w_scale = w_scale.expand(operand.shape[0])
        rows, row_scale, columns, column_scale = quantized_gradient(dy, w_scale, scale, levels)
        if wants[0]:
            part = integer_product(rows, operand.to(torch.int8)) * row_scale.unsqueeze(1)
            dx = part if dx is None else dx + part
        if wants[1] and levels == LEVELS:
            dws.append(integer_product(columns.T, codes) * column_scale.unsqueeze(1))
        elif wants[1]:  # the activations on the left, which an AVX2 product takes as unsigned bytes
            dws.append((integer_product(codes.T, columns) * column_scale).T)
    return dx, dws


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """int8 [M, K] · int8 [K, N], int32. On CPUs: on CUDA torch has a fast kernel for few layouts only."""
    return int8_product(a, b)


def column_levels(device: torch.device) -> float:
    """The largest code of a gradient whose product with int8 activations is exact here.

    127, or 63 where an AVX2 instruction adds two products in 16 bits: 2 · 255 · 63 is below 2¹⁵.
    """
    return _exact_levels() if device.type == "cpu" else LEVELS


# What torch.compiler.assume_constant_result does, but for importing the compiler, which takes a second.
column_levels.__dict__["_dynamo_marked_constant"] = True


def products_are_exact() -> bool:
    """Whether a product of any int8 codes is exact on this CPU."""
    return _exact_levels() == LEVELS


@cache
def _exact_levels() -> float:
    a = torch.full((64, 128), 127, dtype=torch.int8)
    return LEVELS if bool((integer_product(a, a.T) == 128 * 127**2).all()) else 63.0


def fp8_product(dy: Tensor, weight_codes: Tensor) -> Tensor:
    """dy · W in bfloat16, dy [M, N] rounded to float8_e4m3fn with a scale per row, W [N, K] in {-1, 0, 1}, exact.

    N and K must be multiples of 16. Tensor cores of compute capability 8.9 and later do it in hardware.
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
    # Sums only where kernels use them for any number of tokens: Triton's add up the codes of a few.
    sums = codes.new_empty(*codes.shape[:-1], 0) if codes.is_cuda else group_sums(codes, weight.group)
    return ternary_matmul(QuantizedActivations(codes, scale, sums), weight, dtype)


@_packed_product.register_fake
def _(codes: Tensor, scale: Tensor, packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], packed.shape[0], dtype=dtype)


def _node(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one node of a compiled graph; a `custom_op` would add wrappers of autograd to every call."""
    name = function.__name__.lstrip("_")
    torch.library.define(f"nanochat::{name}", torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(f"nanochat::{name}", ("cpu", "cuda"))(function)
    return getattr(torch.ops.nanochat, name).default


@_node
def _int8_product(codes: Tensor, scale: Tensor, operand: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`operations.int8_matmul` as one node: int8 [..., K] and [N, K] to [..., N]."""
    y = int8_matmul(codes.flatten(0, -2), operand, scale.reshape(-1, 1), w_scale.unsqueeze(1), dtype)
    return y.view(*codes.shape[:-1], len(operand))


@torch.library.register_fake("nanochat::int8_product")
def _(codes: Tensor, scale: Tensor, operand: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], operand.shape[0], dtype=dtype)


@_node
def _int8_gradients_on_cuda(
    dys: list[Tensor],
    codes: Tensor,
    scale: Tensor,
    operands: list[Tensor],
    w_scales: list[Tensor],
    dtype: torch.dtype,
    wants_x: bool,
    wants_w: bool,
) -> list[Tensor]:
    """`operations.int8_gradients` as one node: the parts of dx, then the dw."""
    codes, operands = codes.to(torch.int8), [operand.to(torch.int8) for operand in operands]
    wants = wants_x, wants_w
    dxs, dws = int8_gradients(dys, codes, scale.squeeze(1), operands, w_scales, dtype, wants)
    return [*dxs, *dws]


@torch.library.register_fake("nanochat::int8_gradients_on_cuda")
def _(dys, codes, scale, operands, w_scales, dtype, wants_x, wants_w):
    dxs = [codes.new_empty(codes.shape, dtype=dtype) for _ in dys if wants_x]
    return [*dxs, *(codes.new_empty(operand.shape, dtype=torch.float32) for operand in operands if wants_w)]


@torch.library.custom_op("nanochat::quantize_gradient", mutates_args=())
def _quantize_gradient(
    dy: Tensor, factor: Tensor, weight: Tensor, levels: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(quantize_gradient(dy, factor, weight, levels))  # pyright: ignore[reportReturnType]


@_quantize_gradient.register_fake
def _(dy: Tensor, factor: Tensor, weight: Tensor, levels: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, (m, n) = torch.empty_like(dy, dtype=torch.int8, memory_format=torch.contiguous_format), dy.shape
    return codes, factor.new_empty(m), torch.empty_like(codes), factor.new_empty(n)


def quantized_gradient(dy: Tensor, factor: Tensor, weight: Tensor, levels: float) -> QuantizedGradient:
    """`operations.quantize_gradient`: one node of a compiled graph on the CPU, plain code to fuse elsewhere."""
    if dy.device.type == "cpu":
        return QuantizedGradient(*_quantize_gradient(dy, factor, weight, levels))
    return reference.quantize_gradient(dy, factor, weight, levels)
