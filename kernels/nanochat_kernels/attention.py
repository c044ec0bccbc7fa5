"""Causal attention in training whose blocks beyond the diagonal are left out, as one node of a compiled graph.

The gradient is zero, and costs nothing, for queries whose output has none, such as rows that are filtered.
"""

import torch
from torch import Tensor

from nanochat_kernels import operations
from nanochat_kernels.reference.attention import empty_heads


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, T, D] of q [B, H, T, D] and k, v [B, Hkv, T, D], with gradients; see `reference.attention`."""
    return _CausalAttention.apply(q, k, v)  # pyright: ignore[reportReturnType]


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y, lse = _attention(q, k, v)
        ctx.save_for_backward(q, k, v, lse)
        return y

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _attention_backward(grad_outputs[0], *ctx.saved_tensors)


@torch.library.custom_op("nanochat::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return operations.attention(q, k, v)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return empty_heads(q), q.new_empty(q.shape[:3])


@torch.library.custom_op("nanochat::attention_backward", mutates_args=())
def _attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return operations.attention_backward(dy, q, k, v, lse)


@_attention_backward.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_heads(q), empty_heads(k), empty_heads(v)
