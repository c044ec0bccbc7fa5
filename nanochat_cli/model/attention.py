"""Causal grouped-query attention (arXiv:2305.13245): projections, norms and rotation around `attend`."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.attend import attend, attend_cached
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import apply_rope

if TYPE_CHECKING:
    from nanochat_cli.inference.kv_cache import KVCache


class Attention(nn.Module):
    """x [B, T, C] to [B, T, C]; optional RMSNorm on q and k per head, optional sub-norm before wo."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.resolved_head_dim
        inner = self.n_heads * self.head_dim
        self.wq = BitLinear(config.dim, inner, config.quant)
        self.wk = BitLinear(config.dim, self.n_kv_heads * self.head_dim, config.quant)
        self.wv = BitLinear(config.dim, self.n_kv_heads * self.head_dim, config.quant)
        self.wo = BitLinear(inner, config.dim, config.quant)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, config.qk_norm_init) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, config.qk_norm_init) if config.qk_norm else None
        self.sub_norm = RMSNorm(inner, config.norm_eps) if config.sub_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: "KVCache | None" = None) -> Tensor:
        batch, length, _ = x.shape
        quantized = self.wq.quantize_input(x)
        q = self.wq.project(quantized).view(batch, length, self.n_heads, self.head_dim)
        k = self.wk.project(quantized).view(batch, length, self.n_kv_heads, self.head_dim)
        v = self.wv.project(quantized).view(batch, length, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        y = attend(q, k, v) if cache is None else attend_cached(q, k, v, self.layer, cache)
        y = y.transpose(1, 2).reshape(batch, length, -1)
        if self.sub_norm is not None:
            y = self.sub_norm(y)
        return self.wo(y)
