"""PackedTransformer: the trained model in the form that runs fast, for inference only.

Ternary weights are packed once, at load, two bits each; q, k, v and gate, up are one product each. On a CPU a single
token goes through the whole model in one native call; on CUDA its step is a replayed graph. Computes what
`model.Transformer` computes: with `fused=False` and one scale per row even bit for bit, since then only the linear
layers differ, and those are exact integers. `fused` moves norms by a unit in the last place, which moves an
activation to another code only at a tie.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nanochat_cli.inference.packed_block import PackedBlock, PackedFeedForward
from nanochat_cli.inference.projections import Pack, PackedProjection
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.hyper_connections import collapse_streams, expand_streams
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.transformer import Block, Transformer
from nanochat_kernels.backends import Backend, Unsupported, load, report_fallback, requested_backend

if TYPE_CHECKING:
    from nanochat_cli.inference.decode_graph import DecodeGraph
    from nanochat_kernels.cpu.decoder import DecoderLayer, NativeDecoder


class PackedTransformer:
    """tokens int64 [B, T] to hidden [B, T, C], logits [B, T, V]; no gradients.

    backend: reference, cpu or triton, default by device. dtype: of activations, cache and float weights. Does not keep
    the latents of the model it is made from, which may be dropped.
    """

    def __init__(self, model: Transformer, backend: str | None, fused: bool, dtype: torch.dtype) -> None:
        self.config = model.config
        self.device = model.cos.device
        self.dtype = dtype
        project = Pack(_usable_backend(self.device, backend), fused, self.device, dtype)
        self.blocks = [PackedBlock(block, project) for block in model.blocks if isinstance(block, Block)]
        self.embedding = _smallest(model.embedding.weight.detach(), dtype)
        tied = model.head is None
        self.head = self.embedding if tied else _smallest(model.unembedding.detach(), dtype)
        self.norm, self.cos, self.sin = model.norm, model.cos, model.sin
        self._native = self._native_decoder() if fused and project.backend == "cpu" else None
        self._graph: DecodeGraph | None = None

    @classmethod
    @torch.no_grad()
    def from_model(
        cls,
        model: Transformer,
        backend: str | None = None,
        *,
        fused: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> "PackedTransformer":
        """Pack a model on the device where it is. ValueError for a backend that does not exist."""
        return cls(model, backend, fused, dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm. Positions continue those in the cache. ValueError past max_seq_len."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"position {end} is past max_seq_len = {self.config.max_seq_len}")
        cos, sin = self.cos[start:end], self.sin[start:end]
        x = self.embed(tokens)
        streams = self.config.mhc.streams
        if streams > 1:
            x = expand_streams(x, streams)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return self.norm(collapse_streams(x).to(self.dtype) if streams > 1 else x)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] to logits [..., V]."""
        return nn.functional.linear(hidden, self.head.to(hidden.dtype))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens [B, T] into the cache; logits [B, V] after the last of them."""
        if tokens.shape[1] == 1 and self.device.type == "cuda" and all(block.is_static for block in self.blocks):
            return self._replay(tokens, cache)
        if tokens.shape == (1, 1) and self._native is not None and cache.dtype == torch.float32:
            keys, values = cache.keys[:, 0], cache.values[:, 0]
            _, logits = self._native.decode(int(tokens), cache.length, keys, values)
            cache.advance(1)
            return logits.unsqueeze(0)
        hidden = self(tokens, cache)[:, -1]
        if self._native is not None and len(hidden) == 1:
            return self._native.unembed(hidden[0]).unsqueeze(0)
        return self.logits(hidden)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, C] whose product with a hidden state gives the logits."""
        return self.head

    @property
    def bytes(self) -> int:
        """Memory of the weights: packed and float, embedding and head; one of those when they are tied."""
        floats = {id(matrix): matrix.numel() * matrix.element_size() for matrix in (self.embedding, self.head)}
        return sum(block.bytes for block in self.blocks) + sum(floats.values())

    def embed(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.embedding).to(self.dtype)

    def _replay(self, tokens: Tensor, cache: KVCache) -> Tensor:
        from nanochat_cli.inference.decode_graph import DecodeGraph

        if self._graph is None or not self._graph.fits(tokens, cache):
            self._graph = DecodeGraph(self, tokens, cache)
        return self._graph.next_logits(tokens, cache)

    def _native_decoder(self) -> "NativeDecoder | None":
        """The whole-token decoder of the CPU backend, where machine and model have what it needs."""
        from nanochat_kernels.cpu.decoder import NativeDecoder

        layers = [layer for block in self.blocks if (layer := _native_layer(block)) is not None]
        if len(layers) < len(self.blocks) or self.dtype != torch.float32:
            return None
        config = self.config
        try:
            return NativeDecoder(
                layers,
                self.embedding,
                self.head,
                self.norm.weight,
                self.cos,
                self.sin,
                n_heads=config.n_heads,
                n_kv_heads=config.n_kv_heads,
                eps=config.norm_eps,
            )
        except Unsupported as reason:
            report_fallback("whole tokens", "cpu", str(reason))
            return None


def _usable_backend(device: torch.device, backend: str | None) -> Backend | None:
    """The backend for packed weights: the one asked for, else the device's own if it works here, else none.

    None, not the reference: that unpacks on every call, and float weights are faster where nothing compiled exists.
    """
    requested = requested_backend(backend)
    if requested is not None:
        return requested
    own: Backend = "triton" if device.type == "cuda" else "cpu"
    try:
        module = load(own)
        if own == "cpu":
            module.library()
    except Unsupported as reason:
        report_fallback("packed layers", own, str(reason))
        return None
    return own


def _smallest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in float16 where that loses nothing (one read from a GGUF file), else in `dtype`; a copy."""
    if weight.device.type == "cpu" and dtype == torch.float32:
        half = weight.to(torch.float16)
        if torch.equal(half.to(weight.dtype), weight):
            return half
    return weight.to(dtype, copy=True)


def _native_layer(block: PackedBlock) -> "DecoderLayer | None":
    from nanochat_kernels.cpu.decoder import DecoderLayer

    attention, feed_forward = block.attention, block.feed_forward
    if attention is None or attention.gated or block.mixes or not isinstance(feed_forward, PackedFeedForward):
        return None
    packed = [p.weight for p in block.projections() if isinstance(p, PackedProjection)]
    if len(packed) < len(block.projections()):
        return None
    qkv, wo, gate_up, down = packed
    return DecoderLayer(
        attention_norm=block.attention_norm.weight,
        qkv=qkv,
        wo=wo,
        ffn_norm=block.ffn_norm.weight,
        gate_up=gate_up,
        down=down,
        q_norm=_weight(attention.q_norm),
        k_norm=_weight(attention.k_norm),
        attention_sub_norm=_weight(attention.sub_norm),
        ffn_sub_norm=_weight(feed_forward.sub_norm),
    )


def _weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight
