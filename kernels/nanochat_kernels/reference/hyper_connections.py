"""Mixing of residual streams by its formula, in plain PyTorch (arXiv:2512.24880).

    out_i = Σ_j weights_ij · x_j                    the streams x_j, and y as one more of them if it is given

Reading takes one row of weights, writing n rows with y after the streams. The formula is a chain of fused
multiply-adds, so that torch.compile makes it one pass over the streams; autograd gives the gradients.
"""

import torch
from torch import Tensor


def mix_streams(x: Tensor, weights: Tensor, y: Tensor | None = None) -> Tensor:
    """x: float32 [B, T, n, C]; weights: float32 [..., rows, n], or [..., rows, n + 1] with y [B, T, C].

    ...: nothing (one mixing for all tokens) or [B, T]. Float32 [B, T, rows, C].
    """
    sources = x.unbind(dim=-2) if y is None else (*x.unbind(dim=-2), y.float())
    if weights.shape[-2] == 1:
        return sum_of_products(weights.squeeze(-2), sources).unsqueeze(-2)
    return torch.stack([sum_of_products(row, sources) for row in weights.unbind(dim=-2)], dim=-2)


def sum_of_products(weights: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    """Σ_i weights[..., i] · terms[i], terms [B, T, C] each."""
    factors = weights.unsqueeze(-2).unbind(dim=-1)
    total = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        total = torch.addcmul(total, factor, term)
    return total
