"""RMSNorm (arXiv:1910.07467) with a learned weight, in float32."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x · weight / sqrt(mean(x²) + eps) over the last dimension; computed in float32, returned in x's dtype."""

    def __init__(self, dim: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)
