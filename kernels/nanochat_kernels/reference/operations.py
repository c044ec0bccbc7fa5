"""The reference backend: every operation by its definition."""

from collections.abc import Callable, Sequence

from torch import Tensor

from nanochat_kernels.reference.activations import quantize_activations, rmsnorm_quantize, swiglu_quantize
from nanochat_kernels.reference.attention import attention, attention_backward
from nanochat_kernels.reference.cross_entropy import cross_entropy_codes, cross_entropy_gradient
from nanochat_kernels.reference.gradient import int8_gradients, quantize_gradient
from nanochat_kernels.reference.matmul import fp8_matmul, int8_matmul, packed_linear, ternary_matmul, unpack
from nanochat_kernels.reference.nvfp4 import nvfp4_matmul, nvfp4_quantize
from nanochat_kernels.reference.orthogonalize import iterate_int8
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.packing import pack_plane128
from nanochat_kernels.reference.ternarize import Granularity, Ternary, ternarize

__all__ = [
    "attention",
    "attention_backward",
    "cross_entropy_codes",
    "cross_entropy_gradient",
    "fp8_matmul",
    "int8_gradients",
    "int8_matmul",
    "iterate_int8",
    "nvfp4_matmul",
    "nvfp4_quantize",
    "packed_linear",
    "quantize_activations",
    "quantize_gradient",
    "rmsnorm_quantize",
    "swiglu_quantize",
    "ternarize",
    "ternarize_packed",
    "ternarize_rows",
    "ternary_matmul",
    "unpack",
]


def ternarize_packed(weight: Tensor, granularity: Granularity = "row") -> PackedTernary:
    """Codes and scales of a latent weight, packed. float32 [N, K], K a multiple of 128."""
    return PackedTernary.pack(ternarize(weight, granularity))


def ternarize_rows(
    latents: Sequence[Tensor],
    scales: Sequence[Tensor],
    operands: Sequence[Tensor],
    packed: Sequence[Tensor | None],
    ternarize: Callable[[Tensor], Ternary] = ternarize,
) -> None:
    """Refresh what is held of several weights, with one scale per row, in place.

    latents: float [N, K]; scales: float32 [N, 1]; operands: their codes [N, K] in any dtype; packed: uint8 [N, K / 4].
    """
    for latent, scale, operand, held in zip(latents, scales, operands, packed, strict=True):
        ternary = ternarize(latent)
        scale.copy_(ternary.scales)
        operand.copy_(ternary.codes)
        if held is not None:
            held.copy_(pack_plane128(ternary.codes))
