"""Per-token int8 quantisation of activations (BitNet b1.58, arXiv:2402.17764, §2), alone and after a norm or a gate.

The scale is absmax · (1/127), a product, because CUDA turns a division by a constant into one and a CPU does not; codes
divide by the scale with correct rounding. So every backend gets the same integers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MIN_ABSMAX = 1e-5
LEVELS = 127.0
INVERSE_LEVELS = 1.0 / LEVELS


class QuantizedActivations(NamedTuple):
    """x ≈ codes · scale, and sums that correct a product with biased weights.

    codes: int8 [..., K] in [-127, 127]. scale: float32 [..., 1]. sums: int32 [..., K / group], the sum of the codes of
    every group of inputs; by default one group (the whole row).
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


def quantize_activations(x: Tensor, group: int | None = None) -> QuantizedActivations:
    """Symmetric absmax quantisation of the last dimension.

    x: float [..., K]; group: inputs per sum, a divisor of K, default K. A row of zeros gives codes 0, a finite scale.
    """
    codes, scale = codes_and_scale(x)
    codes = codes.to(torch.int8)
    return QuantizedActivations(codes, scale, group_sums(codes, group))


def fake_quantize_activations(x: Tensor) -> Tensor:
    """codes · scale of `quantize_activations`, in the dtype of x, with a straight-through gradient."""
    return _StraightThrough.apply(x)  # pyright: ignore[reportReturnType] - apply is untyped in torch


def mix_activations(x: Tensor, share: Tensor) -> Tensor:
    """x + share · (codes · scale − x), in the dtype of x, with a straight-through gradient. share: float32, 0-dim."""
    return _Mixed.apply(x, share)  # pyright: ignore[reportReturnType] - apply is untyped in torch


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, group: int | None = None) -> QuantizedActivations:
    """`quantize_activations` of RMSNorm(x) (arXiv:1910.07467). x: float [..., K], weight: float [K]."""
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
    return quantize_activations(h * weight, group)


def swiglu_quantize(gate: Tensor, up: Tensor, group: int | None = None) -> QuantizedActivations:
    """`quantize_activations` of silu(gate) · up (arXiv:2002.05202). gate, up: float [..., K]."""
    return quantize_activations(torch.nn.functional.silu(gate.to(torch.float32)) * up.to(torch.float32), group)


def group_sums(codes: Tensor, group: int | None) -> Tensor:
    """int8 [..., K] to int32 [..., K / group]. Raises ValueError if the group does not divide K."""
    width = codes.shape[-1]
    group = group or width
    if width % group:
        raise ValueError(f"{width} inputs cannot be split into groups of {group}")
    return codes.reshape(*codes.shape[:-1], width // group, group).sum(dim=-1, dtype=torch.int32)


def codes_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as float32 integers [..., K], and the scale [..., 1], for training."""
    x = x.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ABSMAX) * INVERSE_LEVELS
    return (x / scale).round().clamp(-LEVELS, LEVELS), scale


class _Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, share: Tensor) -> Tensor:
        codes, scale = codes_and_scale(x)
        return (x + share * (codes * scale - x)).to(x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        codes, scale = codes_and_scale(x)
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]
