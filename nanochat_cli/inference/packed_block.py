"""The blocks of a packed model: `model.Block` with packed projections, whatever it mixes tokens with.

What is no ternary linear layer (norms, gates, routers, the mixing of streams) is the model's own module.
"""

import copy
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanochat_cli.inference.projections import Pack, Projection, swiglu
from nanochat_cli.model.attend import attend, attend_cached
from nanochat_cli.model.attention import Attention, apply_gate, split_gate
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.deltanet import GatedDeltaNet
from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.hyper_connections import HyperConnection, read_streams, write_streams
from nanochat_cli.model.moe import MoE
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import apply_rope
from nanochat_cli.model.transformer import Block

_Module = TypeVar("_Module", bound=nn.Module)


class PackedAttention:
    """Attention of a block with q, k and v from one product; x [B, T, C] is its input before the norm."""

    def __init__(self, attention: Attention, project: Pack) -> None:
        self.layer, self.n_heads, self.n_kv_heads = attention.layer, attention.n_heads, attention.n_kv_heads
        self.head_dim, self.gated = attention.head_dim, attention.gated
        self.qkv = project(attention.wq, attention.wk, attention.wv)
        self.wo = project(attention.wo)
        self.q_norm, self.k_norm, self.sub_norm = attention.q_norm, attention.k_norm, attention.sub_norm

    def __call__(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        q, k, v, gate = self.heads(x, norm, cos, sin)
        y = attend(q, k, v) if cache is None else attend_cached(q, k, v, self.layer, cache)
        return self.output(y, gate)

    def heads(self, x: Tensor, norm: RMSNorm, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, H, T, D], k and v [B, Hkv, T, D], q and k normed and rotated; the gate [B, T, H, D] if there is one."""
        per_head = 2 if self.gated else 1
        qkv = self.qkv.after_norm(x, norm).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split([per_head * self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=2)
        q, gate = split_gate(q.unflatten(2, (self.n_heads, per_head)).flatten(-2), self.gated)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), gate

    def output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """[B, H, T, D] to [B, T, C]."""
        y = apply_gate(y.transpose(1, 2), gate).flatten(2)
        return self.wo(y) if self.sub_norm is None else self.wo.after_norm(y, self.sub_norm)

    def projections(self) -> list[Projection]:
        return [self.qkv, self.wo]


class PackedDeltaNet:
    """Gated DeltaNet with all its ternary inputs from one product."""

    def __init__(self, delta: GatedDeltaNet, project: Pack) -> None:
        self.inputs = project(delta.w_qkv, delta.w_z)
        self.out = project(delta.w_out)
        self.widths = [delta.w_qkv.out_features, delta.w_z.out_features]
        self.mixer = without_linears(delta)

    def __call__(self, x: Tensor, norm: RMSNorm, cache: KVCache | None) -> Tensor:
        x = norm(x)
        mixed, z = self.inputs(x).split(self.widths, dim=-1)
        return self.out(self.mixer.mix(x, mixed, z, cache))

    def projections(self) -> list[Projection]:
        return [self.inputs, self.out]


class PackedFeedForward:
    """SwiGLU with gate and up from one product."""

    def __init__(self, feed_forward: FeedForward, project: Pack) -> None:
        self.gate_up = project(feed_forward.w_gate, feed_forward.w_up)
        self.down = project(feed_forward.w_down)
        self.sub_norm = feed_forward.sub_norm

    def __call__(self, x: Tensor, norm: RMSNorm) -> Tensor:
        gate, up = self.gate_up.after_norm(x, norm).chunk(2, dim=-1)
        if self.sub_norm is None:
            return self.down.after_swiglu(gate, up)
        return self.down.after_norm(swiglu(gate, up), self.sub_norm)

    def projections(self) -> list[Projection]:
        return [self.gate_up, self.down]


class PackedMoE:
    """Mixture of experts: the chosen experts one after the other, each a packed SwiGLU on its own tokens."""

    def __init__(self, moe: MoE, project: Pack) -> None:
        self.experts = []
        for index in range(moe.config.experts):
            gate, up, down = (layer.expert(index) for layer in (moe.w_gate, moe.w_up, moe.w_down))
            self.experts.append((project(gate, up), project(down)))
        shared = moe.shared
        self.shared = None if shared is None else (project(shared.w_gate, shared.w_up), project(shared.w_down))
        self.router = without_linears(moe)
        self.router.shared = None
        self.router.eval()

    def __call__(self, x: Tensor, norm: RMSNorm) -> Tensor:
        shape, x = x.shape, norm(x).flatten(0, -2)
        routing = self.router.route(x)
        ends = [0, *routing.counts.cumsum(0).tolist()]
        out = torch.zeros_like(x) if self.shared is None else _swiglu(self.shared, x)
        for expert, (start, end) in enumerate(pairwise(ends)):
            if start < end:
                tokens = routing.tokens[start:end]
                y = _swiglu(self.experts[expert], x[tokens])
                out.index_add_(0, tokens, (y.float() * routing.weights[start:end, None]).to(out.dtype))
        return out.reshape(shape)

    def projections(self) -> list[Projection]:
        pairs = self.experts if self.shared is None else [*self.experts, self.shared]
        return [projection for pair in pairs for projection in pair]


def _swiglu(pair: tuple[Projection, Projection], x: Tensor) -> Tensor:
    gate_up, down = pair
    return down.after_swiglu(*gate_up(x).chunk(2, dim=-1))


class PackedBlock:
    """Pre-norm mixing of tokens and feed-forward around a plain residual stream or several."""

    def __init__(self, block: Block, project: Pack) -> None:
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.attention = None if block.attention is None else PackedAttention(block.attention, project)
        self.delta = None if block.delta is None else PackedDeltaNet(block.delta, project)
        inner = block.feed_forward
        self.feed_forward = PackedMoE(inner, project) if isinstance(inner, MoE) else PackedFeedForward(inner, project)
        self.mixes: tuple[HyperConnection, HyperConnection] | None = None
        if block.attention_mix is not None and block.ffn_mix is not None:
            self.mixes = block.attention_mix, block.ffn_mix

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        if self.mixes is None:
            x = x + self.mix_tokens(x, cos, sin, cache)
            return x + self.feed_forward(x, self.ffn_norm)
        before, after = self.mixes
        pre, post, _, res = before(x)
        x = write_streams(x, self.mix_tokens(read_streams(x, pre), cos, sin, cache), post, res)
        pre, post, _, res = after(x)
        return write_streams(x, self.feed_forward(read_streams(x, pre), self.ffn_norm), post, res)

    def mix_tokens(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """Attention or DeltaNet of the normed x, [B, T, C]."""
        if self.attention is not None:
            return self.attention(x, self.attention_norm, cos, sin, cache)
        assert self.delta is not None
        return self.delta(x, self.attention_norm, cache)

    @property
    def is_static(self) -> bool:
        """Whether one token takes the same kernels with the same shapes at every position."""
        return self.attention is not None and self.mixes is None and isinstance(self.feed_forward, PackedFeedForward)

    def projections(self) -> list[Projection]:
        mixing = self.attention or self.delta
        assert mixing is not None
        return [*mixing.projections(), *self.feed_forward.projections()]

    @property
    def bytes(self) -> int:
        """Memory of the packed weights."""
        return sum(projection.bytes for projection in self.projections())


def without_linears(module: _Module) -> _Module:
    """The module with its parameters and buffers but without its BitLinear layers, which have been packed."""
    light = copy.copy(module)
    light._modules = {name: child for name, child in module._modules.items() if not isinstance(child, BitLinear)}
    return light
