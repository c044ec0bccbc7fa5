"""Per-token int8 quantisation of activations (BitNet b1.58, arXiv:2402.17764, §2)."""

import torch
from torch import Tensor

MIN_ABSMAX = 1e-5
LEVELS = 127.0


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric absmax quantisation of the last dimension.

    x: float [..., K]. Returns codes int8 [..., K] in [-127, 127] and scale float32 [..., 1] with
    x ≈ codes · scale. A row of zeros gives codes 0 and a finite scale.
    """
    codes, scale = _codes_and_scale(x)
    return codes.to(torch.int8), scale


def fake_quantize_activations(x: Tensor) -> Tensor:
    """codes · scale of `quantize_activations`, in the dtype of x, with a straight-through gradient."""
    return _StraightThrough.apply(x)  # pyright: ignore[reportReturnType] - apply is untyped in torch


def _codes_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float32)
    scale = x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_ABSMAX) / LEVELS
    return (x / scale).round().clamp(-LEVELS, LEVELS), scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        codes, scale = _codes_and_scale(x)
        return (codes * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]
