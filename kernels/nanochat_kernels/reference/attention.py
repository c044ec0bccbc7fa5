"""Causal attention with grouped queries, and its gradients.

q: float [B, H, T, D]; k, v: [B, Hkv, T, D], read by H / Hkv query heads each. What depends on the scores is computed
again in the backward pass, from the log-sum-exp of each row (arXiv:2307.08691, section 3.1).
"""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, H, T, D], and the log-sum-exp [B, H, T] of the scores q · k / sqrt(D) of each query."""
    scores = _scores(q, k)
    lse = scores.logsumexp(dim=-1)
    y = empty_heads(q)
    y.copy_((scores - lse.unsqueeze(-1)).exp() @ _by_query(v, q))
    return y, lse


def attention_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. A query whose dy is zero takes no part."""
    p = (_scores(q, k) - lse.unsqueeze(-1)).exp()
    dp = dy @ _by_query(v, q).transpose(-2, -1)
    ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * q.shape[-1] ** -0.5
    found = ds @ _by_query(k, q), *(_by_key(x, k) for x in (ds.transpose(-2, -1) @ q, p.transpose(-2, -1) @ dy))
    dq, dk, dv = (empty_heads(x).copy_(gradient) for x, gradient in zip((q, k, v), found, strict=True))
    return dq, dk, dv


def empty_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] like x, in memory [B, T, H, D], as the projections around attention read and write it."""
    batch, heads, length, head_dim = x.shape
    return x.new_empty(batch, length, heads, head_dim).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return (q @ _by_query(k, q).transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf)


def _by_query(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, H, T, D] for each query head."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _by_key(x: Tensor, k: Tensor) -> Tensor:
    return x.unflatten(1, (k.shape[1], -1)).sum(dim=2)
