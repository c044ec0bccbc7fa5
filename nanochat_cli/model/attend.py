"""Scaled dot-product attention with grouped queries.

Query head h reads key/value head h // (n_heads / n_kv_heads): the one place that says so. q: [B, H, T, D]; k, v:
[B, Hkv, T, D]; already rotated.
"""

import torch
from torch import Tensor, nn

from nanochat_kernels import scale_gradient


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


def attend_by_chance(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> Tensor:
    """`attend`, causal, of rows that stay in the backward pass by chance: weights [B · T] are 1 over that of each.

    A path of the gradient from token j to the key or value of an earlier token i needs both to be kept. The loss of j
    carries 1 over the chance of j; that of i enters here, for queries of other tokens only: in expectation the gradient
    is that of all rows, if they are drawn independently of each other.
    """
    y = attend(q, scale_gradient(k, weights), scale_gradient(v, weights))
    groups = q.shape[1] // k.shape[1]
    own_k, own_v = (scale_gradient(x, weights, complement=True).repeat_interleave(groups, dim=1) for x in (k, v))
    return y + _own_part(q, own_k, own_v, y.detach())


def _own_part(q: Tensor, k: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """Zero, with the gradient of y that goes to the key and value of the query's own token."""
    scale = q.shape[-1] ** -0.5
    q = q.detach()
    with torch.no_grad():
        future = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        shares = (q @ k.transpose(-2, -1) * scale).masked_fill(future, -torch.inf).softmax(dim=-1)
        own = shares.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    part = own * (v + (v.detach() - y) * (q * k).sum(dim=-1, keepdim=True) * scale)
    return part - part.detach()
