"""Causal grouped-query attention (arXiv:2305.13245): projections, norms and rotation around `attend`."""

from torch import Tensor, nn

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.model.attend import AttentionForm, attend, attend_in_training
from nanochat_cli.model.bitlinear import BitLinear, Joint
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import apply_rope
from nanochat_kernels import drop_filtered


class Attention(nn.Module):
    """x [B, T, C], before `norm`, to [B, T, C]; optional RMSNorm on q and k per head, gate and sub-norm before wo.

    gated: wq has 2 D rows a head, the query and then the gate, whose sigmoid multiplies what the head returns (arch
    qwen35; arXiv:2505.06708).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.resolved_head_dim
        inner = self.n_heads * self.head_dim
        self.gated = config.resolved_attention_gate
        self.wq = BitLinear(config.dim, 2 * inner if self.gated else inner, config.quant)
        self.wk = BitLinear(config.dim, self.n_kv_heads * self.head_dim, config.quant)
        self.wv = BitLinear(config.dim, self.n_kv_heads * self.head_dim, config.quant)
        self.wo = BitLinear(inner, config.dim, config.quant)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps, config.qk_norm_init) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps, config.qk_norm_init) if config.qk_norm else None
        self.sub_norm = RMSNorm(inner, config.norm_eps) if config.sub_norm else None
        self.qkv, self.out = Joint(self.wq, self.wk, self.wv), Joint(self.wo)
        self.form: AttentionForm = "torch"

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.qkv.outputs(x, norm)
        q, gate = split_gate(q.view(batch, length, self.n_heads, -1), self.gated)
        k = k.view(batch, length, self.n_kv_heads, self.head_dim)
        v = v.view(batch, length, self.n_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if self.training:
                # Keys of rows that are left out get no gradient: nor may the norm's weight from them, unlike wk and wv,
                # which leave such rows out themselves.
                k = drop_filtered(k, self.wk.kept)
        q, k = apply_rope(q, cos, sin).transpose(1, 2), apply_rope(k, cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if mask is not None:
            y = attend(q, k, v, is_causal=False, mask=mask)
        elif self.training and cache is None:
            y = attend_in_training(q, k, v, self.form)
        else:
            y = attend(q, k, v) if cache is None else cache.attend(self.layer, q, k, v)
        y = apply_gate(y.transpose(1, 2), gate).reshape(batch, length, -1)
        return self.out.output(y, self.sub_norm)


def split_gate(q: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    """Query and gate, [..., D] each, of a joint projection [..., 2 D]; without a gate the query as it is."""
    if not gated:
        return q, None
    query, gate = q.chunk(2, dim=-1)
    return query, gate


def apply_gate(y: Tensor, gate: Tensor | None) -> Tensor:
    """y · σ(gate), both [B, T, H, D]."""
    return y if gate is None else y * gate.sigmoid()
