"""The cross-entropy of rows of logits with its gradient, in float or in int8 for integer products.

A row of the softmax has a few large elements, and thousands that are small and matter as a sum. Rounding to the nearest
step would lose those. Codes are rounded down after a dither instead: its values fill [0, 1) evenly along rows and along
columns, so that the mean of many codes has no error, whichever way a product sums them. It depends on the place of an
element alone. The target's −1, as large as all other elements together, is not among the codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

DITHER_ROW, DITHER_COLUMN = 0x91E10DA5, 0xC13FA9A9
"""2³² over the square of the plastic number, and over itself: the R2 sequence, whose points are evenly spread."""


class CodedGradient(NamedTuple):
    """Gradient ≈ codes · scale − factor at the target. loss, scale: float32 [M]; codes: int8 [M, V], not negative."""

    loss: Tensor
    codes: Tensor
    scale: Tensor


def softmax_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies [M] and the gradient of their sum to the logits; written so that one pass each is enough.

    logits: float32 [M, V], overwritten with the gradient; targets: int64 [M]. Rows with a negative target have no loss
    and a gradient of zero.
    """
    valid = targets >= 0
    safe = targets.clamp(min=0)
    maximum = logits.amax(dim=-1, keepdim=True)
    picked = logits.gather(1, safe.unsqueeze(1))
    exponentials = logits.sub_(maximum).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    loss = torch.where(valid, (total.log() + maximum - picked).squeeze(1), 0.0)
    gradient = exponentials.mul_(valid.unsqueeze(1) / total)
    gradient.scatter_add_(1, safe.unsqueeze(1), -valid.unsqueeze(1).to(gradient.dtype))
    return loss, gradient


def cross_entropy_gradient(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_gradient`, with the gradient of each row times its factor, float32 [M].

    logits: [M, V], overwritten with the gradient in their dtype, which only the result is rounded to. loss: float32.
    """
    loss, gradient = softmax_gradient(logits.float(), targets)
    return loss, logits.copy_(gradient.mul_(factor.unsqueeze(1)))


def cross_entropy_codes(
    logits: Tensor, targets: Tensor, factor: Tensor, levels: float = 127.0, first: int = 0
) -> CodedGradient:
    """The same with the softmax as codes up to `levels`. first: the place of the first row. Overwrites logits.

    Where a row is not finite, neither are its loss and its scale.
    """
    (rows, columns), valid = logits.shape, targets >= 0
    maximum = logits.amax(dim=-1)
    picked = logits.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    exponentials = logits.sub_(maximum.unsqueeze(1)).exp_()
    total = exponentials.sum(dim=-1)
    codes = (exponentials * levels + dither(rows, columns, first, logits.device)).round()
    return CodedGradient(
        torch.where(valid, total.log() + maximum - picked, 0.0),
        torch.where(valid.unsqueeze(1), codes, 0.0).to(torch.int8),
        torch.where(valid, factor / (total * levels), 0.0),
    )


def dither(rows: int, columns: int, first: int, device: torch.device) -> Tensor:
    """float32 [rows, columns] in [−½, ½)."""
    row, column = (torch.arange(n, device=device) for n in (rows, columns))
    places = (row + first).unsqueeze(1) * DITHER_ROW + column * DITHER_COLUMN
    return (places >> 16 & 0xFFFF).to(torch.float32) * 2.0**-16 - 0.5
