"""Rotary position embedding (arXiv:2104.09864), half-split form.

The one convention of this project: dimension i of a head is rotated with dimension i + D/2 ("NEOX",
`rotate_half`). llama.cpp's arch `llama` rotates neighbouring pairs instead; the exporter permutes the
rows of wq and wk for it. The archs `qwen3` and `bitnet` use our form as it is.
"""

import torch
from torch import Tensor


def rope_table(positions: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head_dim / 2], of the angles position · theta^(-2i / head_dim)."""
    inverse_frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), inverse_frequency)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, T, H, D] by cos, sin [T, D / 2], or [B, T, D / 2]; returned in x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
