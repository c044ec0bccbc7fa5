"""The operations of this package, each one function that finds the backend for its tensors.

The argument `backend` (reference, cpu, triton) or the variable NANOCHAT_BACKEND overrides the choice by device. Shapes,
dtypes and formulas are the reference's, which every backend matches: integers bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_kernels.backends import dispatch
from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.cross_entropy import CodedGradient
from nanochat_kernels.reference.gradient import QuantizedGradient
from nanochat_kernels.reference.nvfp4 import Nvfp4Activations
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.ternarize import Granularity, Ternary


def ternarize(weight: Tensor, granularity: Granularity = "row", *, backend: str | None = None) -> Ternary:
    """Absmean codes and float16-exact scales of a latent weight; see `reference.ternarize`. No host sync on CUDA."""
    return dispatch("ternarize", weight.device, backend, weight, granularity)


def ternarize_packed(weight: Tensor, granularity: Granularity = "row", *, backend: str | None = None) -> PackedTernary:
    """`ternarize` and `PackedTernary.pack` in one pass. weight: float32 [N, K], K a multiple of 128."""
    return dispatch("ternarize_packed", weight.device, backend, weight, granularity)


def ternarize_rows(
    latents: Sequence[Tensor],
    scales: Sequence[Tensor],
    operands: Sequence[Tensor],
    packed: Sequence[Tensor | None],
    *,
    backend: str | None = None,
) -> None:
    """Refresh what is held of several weights of one device in place; see `reference.operations.ternarize_rows`."""
    dispatch("ternarize_rows", latents[0].device, backend, latents, scales, operands, packed)


def quantize_activations(x: Tensor, group: int | None = None, *, backend: str | None = None) -> QuantizedActivations:
    """int8 codes, scale and sums per token; see `reference.activations.quantize_activations`."""
    return dispatch("quantize_activations", x.device, backend, x, group)


def rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, group: int | None = None, *, backend: str | None = None
) -> QuantizedActivations:
    """RMSNorm and quantisation in one pass; see `reference.activations.rmsnorm_quantize`."""
    return dispatch("rmsnorm_quantize", x.device, backend, x, weight, eps, group)


def swiglu_quantize(
    gate: Tensor, up: Tensor, group: int | None = None, *, backend: str | None = None
) -> QuantizedActivations:
    """silu(gate) · up and quantisation in one pass; see `reference.activations.swiglu_quantize`."""
    return dispatch("swiglu_quantize", gate.device, backend, gate, up, group)


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Causal attention and the log-sum-exp of each row of scores; see `reference.attention`."""
    return dispatch("attention", q.device, backend, q, k, v)


def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients, by q, k and v; see `reference.attention`."""
    return dispatch("attention_backward", q.device, backend, dy, q, k, v, lse)


def quantize_gradient(
    dy: Tensor, factor: Tensor, weight: Tensor, levels: float = 127.0, *, backend: str | None = None
) -> QuantizedGradient:
    """int8 codes of a gradient by row and by column; see `reference.gradient.quantize_gradient`."""
    return dispatch("quantize_gradient", dy.device, backend, dy, factor, weight, levels)


def int8_gradients(
    dys: Sequence[Tensor],
    codes: Tensor,
    scale: Tensor,
    operands: Sequence[Tensor],
    w_scales: Sequence[Tensor],
    dtype: torch.dtype,
    wants: tuple[bool, bool] = (True, True),
    *,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of layers that read one input; see `reference.gradient.int8_gradients`."""
    arguments = (dys, codes, scale, operands, w_scales, dtype, wants)
    return dispatch("int8_gradients", codes.device, backend, *arguments)


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, factor: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Losses of rows of logits, which become their gradient; see `reference.cross_entropy.cross_entropy_gradient`."""
    return dispatch("cross_entropy_gradient", logits.device, backend, logits, targets, factor)


def cross_entropy_codes(
    logits: Tensor,
    targets: Tensor,
    factor: Tensor,
    levels: float = 127.0,
    first: int = 0,
    *,
    backend: str | None = None,
) -> CodedGradient:
    """A gradient in int8, but for the target's part; see `reference.cross_entropy.cross_entropy_codes`."""
    return dispatch("cross_entropy_codes", logits.device, backend, logits, targets, factor, levels, first)


def iterate_int8(
    x: Tensor,
    coefficients: Sequence[tuple[float, float, float]],
    tighten: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Newton-Schulz iterations of one matrix by integer products; see `reference.orthogonalize.iterate_int8`."""
    return dispatch("iterate_int8", x.device, backend, x, coefficients, tighten)


def int8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """int8 [M, K] · int8 [N, K]ᵀ with a scale per row of each; see `reference.matmul.int8_matmul`."""
    return dispatch("int8_matmul", a.device, backend, a, b, a_scale, b_scale, out_dtype)


def fp8_matmul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """float8_e4m3fn [M, K] · float8_e4m3fn [N, K]ᵀ with scales; see `reference.matmul.fp8_matmul`."""
    return dispatch("fp8_matmul", a.device, backend, a, b, a_scale, b_scale, out_dtype)


def nvfp4_quantize(x: Tensor, *, backend: str | None = None) -> Nvfp4Activations:
    """Four-bit codes, block scales and a scale per token; see `reference.nvfp4`."""
    return dispatch("nvfp4_quantize", x.device, backend, x)


def nvfp4_matmul(
    packed: Tensor,
    scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """NVFP4 activations [M, K] · e2m1 weights [N, K]ᵀ; see `reference.nvfp4.nvfp4_matmul`."""
    return dispatch("nvfp4_matmul", packed.device, backend, packed, scale, weight, w_scale, out_dtype)


def ternary_matmul(
    activations: QuantizedActivations,
    weight: PackedTernary,
    out_dtype: torch.dtype = torch.float32,
    *,
    backend: str | None = None,
) -> Tensor:
    """Quantised activations times packed weights: [..., K] to [..., N]; the backend picks the kernel by rows."""
    return dispatch("ternary_matmul", weight.packed.device, backend, activations, weight, out_dtype)


def packed_linear(
    x: Tensor, weight: PackedTernary, out_dtype: torch.dtype = torch.float32, *, backend: str | None = None
) -> Tensor:
    """Quantise float [..., K] and multiply by packed weights: [..., N]. One native call on the CPU."""
    return dispatch("packed_linear", weight.packed.device, backend, x, weight, out_dtype)


def unpack(weight: PackedTernary, dtype: torch.dtype = torch.int8, *, backend: str | None = None) -> Tensor:
    """The codes [N, K] as int8, bfloat16, float32 or float8_e4m3fn. ValueError for code 3 (reference and CPU)."""
    return dispatch("unpack", weight.packed.device, backend, weight, dtype)
