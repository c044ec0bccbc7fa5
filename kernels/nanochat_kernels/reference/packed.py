"""PackedTernary: a ternary matrix as inference stores and multiplies it.

Knows the plane-128 bytes and their scales; leaves the products to the operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_kernels.reference.packing import PLANE, pack_plane128, unpack_plane128
from nanochat_kernels.reference.ternarize import Granularity, Ternary


@dataclass(frozen=True)
class PackedTernary:
    """packed: uint8 [N, K / 4] in plane-128 order, contiguous, without code 3.

    scales: float32 [N, 1] for one per row (or tensor, repeated), [N, K / g] for groups; contiguous.
    """

    packed: Tensor
    scales: Tensor
    columns: int

    @classmethod
    def pack(cls, ternary: Ternary) -> "PackedTernary":
        """Pack codes and scales. Raises ValueError if K is not a multiple of 128 or a code is not -1, 0 or 1."""
        rows, columns = ternary.codes.shape
        scales = ternary.scales.to(torch.float32).expand(rows, -1).contiguous()
        return cls(pack_plane128(ternary.codes).contiguous(), scales, columns)

    @classmethod
    def from_bytes(cls, packed: Tensor, scales: Tensor, columns: int) -> "PackedTernary":
        """Packed bytes from elsewhere, such as a file. Raises ValueError for sizes that do not fit and for code 3."""
        if columns % PLANE or packed.ndim != 2 or packed.shape[1] * 4 != columns:
            raise ValueError(f"packed weights of shape {list(packed.shape)} do not hold rows of {columns} codes")
        if scales.ndim != 2 or scales.shape[0] != packed.shape[0] or columns % max(scales.shape[1], 1):
            raise ValueError(f"scales of shape {list(scales.shape)} do not fit {packed.shape[0]} rows of {columns}")
        if bool((packed & packed >> 1 & 0x55).any()):
            raise ValueError("invalid code 3 in packed ternary weights")
        return cls(packed.contiguous(), scales.to(torch.float32).contiguous(), columns)

    @classmethod
    def concatenate(cls, parts: Sequence["PackedTernary"]) -> "PackedTernary":
        """Stack the rows of several matrices, to multiply them in one call (q, k, v; gate, up)."""
        columns = {part.columns for part in parts}
        if len(columns) != 1:
            raise ValueError(f"matrices with different inputs cannot share a product: K = {sorted(columns)}")
        groups = max(part.n_groups for part in parts)
        scales = [part.scales.repeat_interleave(groups // part.n_groups, dim=1) for part in parts]
        return cls(torch.cat([part.packed for part in parts]), torch.cat(scales), columns.pop())

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @property
    def n_groups(self) -> int:
        """Scales per row."""
        return self.scales.shape[1]

    @property
    def group(self) -> int:
        """Inputs per scale; K for one scale per row."""
        return self.columns // self.n_groups

    @property
    def bytes(self) -> int:
        """Memory of codes and scales."""
        return self.packed.numel() + self.scales.numel() * self.scales.element_size()

    def to(self, device: torch.device | str) -> "PackedTernary":
        return PackedTernary(self.packed.to(device), self.scales.to(device), self.columns)

    def ternary(self) -> Ternary:
        """The inverse of `pack`. Raises ValueError for code 3."""
        granularity: Granularity = "row" if self.n_groups == 1 else self.group
        return Ternary(unpack_plane128(self.packed, self.columns), self.scales, granularity)
