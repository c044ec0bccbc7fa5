"""The packed form of ternary codes: "plane-128", byte for byte the `qs` field of llama.cpp's TQ2_0.

128 consecutive weights of a row become 32 bytes; byte j holds the biased codes (w + 1) of inputs
j, j + 32, j + 64 and j + 96 in bits 0-1, 2-3, 4-5 and 6-7. Scales are kept apart.
"""

import torch
from torch import Tensor

PLANE = 128


def pack_plane128(codes: Tensor) -> Tensor:
    """codes: int8 [N, K] in {-1, 0, 1}, K a multiple of 128. Returns uint8 [N, K / 4]. Raises ValueError otherwise."""
    rows, columns = codes.shape
    if columns % PLANE:
        raise ValueError(f"K = {columns} is not a multiple of {PLANE}")
    if bool((codes.abs() > 1).any()):
        raise ValueError("codes must be -1, 0 or 1")
    planes = (codes + 1).to(torch.uint8).reshape(rows, columns // PLANE, 4, PLANE // 4)
    packed = planes[:, :, 0] | planes[:, :, 1] << 2 | planes[:, :, 2] << 4 | planes[:, :, 3] << 6
    return packed.reshape(rows, columns // 4)


def unpack_plane128(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_plane128`: uint8 [N, K / 4] to int8 [N, K]. Raises ValueError for a wrong size or code 3."""
    rows = packed.shape[0]
    if columns % PLANE or packed.shape[1] * 4 != columns:
        raise ValueError(f"{packed.shape[1]} bytes per row do not hold {columns} codes in planes of {PLANE}")
    bytes_ = packed.reshape(rows, columns // PLANE, 1, PLANE // 4)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device).reshape(1, 1, 4, 1)
    biased = bytes_ >> shifts & 3
    if bool((biased == 3).any()):
        raise ValueError("invalid code 3 in packed ternary weights")
    return (biased.to(torch.int8) - 1).reshape(rows, columns)
