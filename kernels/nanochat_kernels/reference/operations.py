"""The reference backend: every operation by its definition."""

from torch import Tensor

from nanochat_kernels.reference.activations import quantize_activations, rmsnorm_quantize, swiglu_quantize
from nanochat_kernels.reference.attention import attention, attention_backward
from nanochat_kernels.reference.cross_entropy import cross_entropy_codes, cross_entropy_gradient
from nanochat_kernels.reference.gradient import quantize_gradient
from nanochat_kernels.reference.matmul import fp8_matmul, int8_matmul, packed_linear, ternary_matmul, unpack
from nanochat_kernels.reference.orthogonalize import iterate_int8
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.ternarize import Granularity, ternarize

__all__ = [
    "attention",
    "attention_backward",
    "cross_entropy_codes",
    "cross_entropy_gradient",
    "fp8_matmul",
    "int8_matmul",
    "iterate_int8",
    "packed_linear",
    "quantize_activations",
    "quantize_gradient",
    "rmsnorm_quantize",
    "swiglu_quantize",
    "ternarize",
    "ternarize_packed",
    "ternary_matmul",
    "unpack",
]


def ternarize_packed(weight: Tensor, granularity: Granularity = "row") -> PackedTernary:
    """Codes and scales of a latent weight, packed. float32 [N, K], K a multiple of 128."""
    return PackedTernary.pack(ternarize(weight, granularity))
