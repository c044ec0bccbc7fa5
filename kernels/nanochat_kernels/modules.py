"""PackedLinear: a linear layer for inference that holds two bits per weight.

The module layer of this package: parameters, shapes and state dict; `operations.packed_linear` computes.
"""

from typing import Self

import torch
from torch import Tensor, nn

from nanochat_kernels.operations import packed_linear, ternarize_packed
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.ternarize import Granularity


class PackedLinear(nn.Module):
    """y = Q(x) · Wᵀ with packed ternary W and int8 activations, no bias; no gradient.

    x: float [..., K] to [..., N] of the same dtype. backend: as for the operations.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, weight: PackedTernary, backend: str | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.columns, weight.rows
        self.backend = backend
        self.register_buffer("packed", weight.packed)
        self.register_buffer("scales", weight.scales)

    @classmethod
    def from_weight(cls, weight: Tensor, granularity: Granularity = "row", backend: str | None = None) -> Self:
        """Quantise a float weight [N, K], such as an nn.Linear's. Raises ValueError unless K is a multiple of 128."""
        return cls(ternarize_packed(weight, granularity, backend=backend), backend)

    @property
    def weight(self) -> PackedTernary:
        """The present matrix, even after `to` or `load_state_dict`."""
        return PackedTernary(self.packed, self.scales, self.in_features)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, x.dtype, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, groups={self.scales.shape[1]}"
