"""The gradients of a language model's head in bf16 or int8, for some rows of logits at a time.

    dx = g · w,  dw = gᵀ · x,  g = (softmax − target) · factor

In int8 the softmax is rounded as in `reference.cross_entropy`, w and x to the nearest code with a scale per column,
after the scales of the softmax's rows are multiplied into x. The terms of the targets are exact. Logits and loss are in
float32 in both formats.
"""

from typing import Literal

import torch
from torch import Tensor

from nanochat_kernels.linear_products import column_levels, integer_product
from nanochat_kernels.operations import cross_entropy_codes, cross_entropy_gradient, quantize_gradient
from nanochat_kernels.reference.activations import LEVELS

BLOCK = 1024
"""Rows of the weight's gradient whose product is added while it is in the cache."""
MAX_TERMS = 2**31 // 127**2
"""So many products of two codes fit into 32 bits."""


class HeadGradients:
    """The gradients [M, C] and [V, C] of Σ factor · loss, each only where wanted; complete after the last rows.

    hidden: float32 [M, C]; weight: float32 [V, C]; targets: int64 [M], negative: no loss; factor: float32 [M], 0 there.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        factor: Tensor,
        backward: Literal["bf16", "int8"],
        wants: tuple[bool, bool] = (True, True),
    ) -> None:
        self.hidden, self.weight, self.targets, self.factor = hidden, weight, targets, factor
        self.backward = backward
        self.of_hidden = torch.empty_like(hidden) if wants[0] else None
        self.of_weight = torch.zeros_like(weight) if wants[1] else None
        self._levels = column_levels(hidden.device)
        if backward == "int8":
            self._operand, self._scale = _by_column(weight, torch.ones(len(weight)), self._levels)
        else:
            self._operand, self._scale = weight.to(torch.bfloat16), torch.ones(())

    def add(self, logits: Tensor, rows: slice) -> Tensor:
        """Cross-entropies, float32 [rows]. logits: float32 [rows, V], which is overwritten."""
        if self.backward == "int8":
            return self._add_int8(logits, rows)
        loss, gradient = cross_entropy_gradient(logits, self.targets[rows], self.factor[rows])
        gradient = gradient.to(torch.bfloat16)
        if self.of_hidden is not None:
            self.of_hidden[rows] = gradient @ self._operand
        if self.of_weight is not None:
            self.of_weight += gradient.T @ self.hidden[rows].to(torch.bfloat16)
        return loss

    def _add_int8(self, logits: Tensor, rows: slice) -> Tensor:
        hidden, factor, safe = self.hidden[rows], self.factor[rows], self.targets[rows].clamp(min=0)
        loss, codes, scale = cross_entropy_codes(logits, self.targets[rows], factor, self._levels, rows.start)
        if self.of_hidden is not None:
            of_hidden = torch.mul(integer_product(codes, self._operand), self._scale, out=self.of_hidden[rows])
            of_hidden.mul_(scale.unsqueeze(1)).addcmul_(self.weight[safe], factor.unsqueeze(1), value=-1)
        if self.of_weight is not None:
            hidden_codes, hidden_scale = _by_column(hidden, scale, self._levels)
            for some, of_weight in zip(codes.split(BLOCK, dim=1), self.of_weight.split(BLOCK), strict=True):
                if self._levels == LEVELS:
                    product = integer_product(some.T, hidden_codes)
                else:  # the softmax on the right, as an AVX2 product takes its left operand as unsigned bytes
                    product = integer_product(hidden_codes.T, some).T
                of_weight.addcmul_(product.to(torch.float32), hidden_scale)
            self.of_weight.index_add_(0, safe, hidden * factor.unsqueeze(1), alpha=-1)
        return loss


def _by_column(x: Tensor, weight: Tensor, levels: float) -> tuple[Tensor, Tensor]:
    """Codes int8 [M, N] and scales [N] of x · weight, x [M, N], weight [M]."""
    return quantize_gradient(x, torch.ones(x.shape[1]), weight, levels)[2:]
