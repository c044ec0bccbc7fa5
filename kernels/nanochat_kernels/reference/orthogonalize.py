"""Newton-Schulz iteration of one matrix with integer products: x ← a x + (b G + c G²) x, G = x xᵀ.

A row of int8 codes shares a scale, and the diagonals of G and of its polynomial are an order of magnitude larger than
what is beside them. They stay in float, where they are only factors of rows; the products are those of the rest. That
makes the result as exact as in bfloat16; with the diagonals among the codes it is ten times less exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_kernels.reference.activations import INVERSE_LEVELS, LEVELS

MIN_ABSMAX = 1e-30


def iterate_int8(x: Tensor, coefficients: Sequence[tuple[float, float, float]], tighten: bool = False) -> Tensor:
    """x: float32 [R, C], R ≤ C, contiguous, of Frobenius norm at most 1; overwritten, and returned.

    coefficients: (a, b, c) of each iteration. tighten: first divide x by ‖G‖^½, still no less than its largest singular
    value (arXiv:2506.10935).
    """
    for index, (a, b, c) in enumerate(coefficients):
        codes, scale = _quantized_rows(x)
        gram = _without_diagonal((codes @ codes.T) * scale * scale.T)
        diagonal = x.square().sum(dim=1)
        if tighten and index == 0:
            room = tightening(diagonal.square().sum() + gram.square().sum())
            a, b, c = a * room, b * room**3, c * room**5
        gram_codes, gram_scale = _quantized_rows(gram)
        square = _without_diagonal((gram_codes @ gram_codes.T) * gram_scale * gram_scale.T)
        beside = (b + c * (diagonal.unsqueeze(1) + diagonal)) * gram + c * square
        on_diagonal = b * diagonal + c * (diagonal.square() + gram.square().sum(dim=1))
        polynomial, step = _quantized_rows(beside * scale.T)
        x.mul_((a + on_diagonal).unsqueeze(1)).add_((polynomial @ codes) * step)
    return x


def tightening(square: Tensor) -> Tensor:
    """‖G‖^-½ of a matrix of norm 1: what it may be multiplied by. square: ‖G‖², 0-dim."""
    return square.clamp(min=MIN_ABSMAX) ** -0.25


def _quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers in float32, whose products are exact up to 2²⁴ / 127² columns, and their scales [R, 1]."""
    absmax = x.abs().amax(dim=1, keepdim=True).clamp(min=MIN_ABSMAX)
    return (x * (torch.full_like(absmax, LEVELS) / absmax)).round(), absmax * INVERSE_LEVELS


def _without_diagonal(x: Tensor) -> Tensor:
    return x - torch.diag(x.diagonal())
