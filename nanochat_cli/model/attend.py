"""Scaled dot-product attention with grouped queries, over a whole sequence or through the key/value cache.

Query head h reads key/value head h // (n_heads / n_kv_heads): the one place that says so. q: [B, H, T, D]; k, v:
[B, Hkv, T, D]; already rotated.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from nanochat_cli.model.cache import KVCache


def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = True, mask: Tensor | None = None) -> Tensor:
    """[B, H, T, D]. mask: bool, true where a query may look, broadcast to [B, H, T, S]."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, layer: int, cache: "KVCache") -> Tensor:
    """As `attend` for the next T positions: they see every cached one and, causally, each other."""
    length = q.shape[2]
    k, v = cache.update(layer, k, v)
    if length == k.shape[2]:
        return attend(q, k, v)
    if length == 1:
        return attend_one(q, k, v)
    mask = q.new_ones(length, k.shape[2]).tril(diagonal=k.shape[2] - length).bool()
    return attend(q, k, v, is_causal=False, mask=mask)


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """One query a head, [B, H, 1, D]: the heads that share keys are rows of one product, so that no key is copied."""
    batch, _, _, head_dim = q.shape
    rows = q.reshape(batch, k.shape[1], -1, head_dim)
    y = nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=mask)
    return y.reshape(q.shape)
