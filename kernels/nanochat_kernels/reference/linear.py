"""The ternary linear operation for training: forward with the effective weight, gradient to the latent.

The effective weight is computed once per optimizer step, by the caller; here it is an input. That
keeps quantisation out of the forward pass and makes every micro-batch of a step see the same codes.
"""

import torch
from torch import Tensor


def ternary_linear(x: Tensor, latent: Tensor, effective: Tensor) -> Tensor:
    """y = x · effectiveᵀ, with the straight-through gradient of `effective` going to `latent`.

    x: [..., K] (already quantised), latent and effective: [N, K]. Returns [..., N].
    Backward: dx = dy · effective, dlatent = dyᵀ · x. Under autocast x and effective are cast to its dtype first.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _TernaryLinear.apply(x, latent, effective)  # pyright: ignore[reportReturnType] - apply is untyped


class _TernaryLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, latent: Tensor, effective: Tensor) -> Tensor:
        weight = effective.to(x.dtype)
        ctx.save_for_backward(x, weight)
        ctx.latent_dtype = latent.dtype
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,) = grad_outputs
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dlatent = None
        if ctx.needs_input_grad[1]:
            dlatent = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])
            dlatent = dlatent.to(ctx.latent_dtype)
        return dx, dlatent, None
