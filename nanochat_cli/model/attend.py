"""Scaled dot-product attention with grouped queries.

Query head h reads key/value head h // (n_heads / n_kv_heads): here and in
`nanochat_kernels.attention`. q: [B, H, T, D]; k, v: [B, Hkv, T, D]; already rotated.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from nanochat_kernels import causal_attention

AttentionForm = Literal["torch", "blocks"]
"""torch: scaled_dot_product_attention; blocks: `causal_attention`, where it is written for: float32 on the CPU."""


def attend_in_training(q: Tensor, k: Tensor, v: Tensor, form: AttentionForm) -> Tensor:
    """`attend`, causal, in this form."""
    fits = q.device.type == "cpu" and q.dtype == torch.float32 and q.shape[-1] % 16 == 0
    return causal_attention(q, k, v) if form == "blocks" and fits else attend(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """[B, H, T, D]. mask: bool, true where a query may look, broadcast to [B, H, T, S]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query a head, [B, H, 1, D]: the heads that share keys are rows of one product, so that no key is copied."""
    batch, _, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, head_dim)
    y = nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return y.reshape(q.shape)
