"""RMSNorm (arXiv:1910.07467) with a learned weight, in float32."""

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + eps) over the last dimension; computed in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNormFunction.apply(x, self.weight, self.eps)  # pyright: ignore[reportReturnType]


class _RMSNormFunction(torch.autograd.Function):
    """The bits of the formula under autograd, with half of the passes over memory in backward and x alone saved."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.float()
        inverse = torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, inverse, weight)
        return (h * inverse * weight).to(x.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Any:
        x, inverse, weight = ctx.saved_tensors
        dy, h = grad_outputs[0].float(), x.float() * inverse
        product = dy * h
        dweight = product.reshape(-1, x.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        mean = (product @ weight.float()).unsqueeze(-1) / x.shape[-1]
        dx = ((dy * weight).addcmul_(h, mean, value=-1)).mul_(inverse)
        return dx.to(x.dtype), None if dweight is None else dweight.to(weight.dtype), None
