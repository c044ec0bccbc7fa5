"""PackedTransformer: the trained model in the form that runs fast, for inference only.

Its weights are packed once, at load. On a CPU a token goes through the whole model in one native call; on CUDA its step
is a replayed graph. Computes what `model.Transformer` computes: with `fused=False` and one scale per row even bit for
bit, since then only the linear layers differ, and those are exact integers. `fused` moves norms by a unit in the last
place, which moves an activation to another code only at a tie.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nanochat_cli.inference.decode_graph import DecodeGraph
from nanochat_cli.inference.pack import PackedProjection, Packer
from nanochat_cli.model.cache import CacheRows, KVCache
from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.transformer import Block, Transformer
from nanochat_kernels.backends import Unsupported, report_fallback, usable_backend
from nanochat_kernels.cpu.decoder import DecoderLayer, NativeDecoder


class PackedTransformer:
    """tokens int64 [B, T] to hidden [B, T, C], logits [B, T, V]; no gradients.

    backend: reference, cpu or triton, default by device. dtype: of activations, cache and float weights. Does not keep
    the latents of the model it is made from, which may be dropped.
    """

    def __init__(self, model: Transformer, backend: str | None, fused: bool, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = model.config, model.cos.device, dtype
        packer = Packer(usable_backend(self.device, backend), fused, self.device, dtype)
        self.body = packer.pack(model)
        """Blocks and final norm."""
        del self.body.embedding, self.body.head
        self.projections = packer.projections
        self.embedding = _smallest(model.embedding.weight.detach(), dtype)
        self.head = self.embedding if model.head is None else _smallest(model.head.weight.detach(), dtype)
        is_packed = all(isinstance(projection, PackedProjection) for projection in self.projections)
        self._native = self._native_decoder() if fused and packer.backend == "cpu" and is_packed else None
        is_plain = not (model.config.is_hybrid or model.config.moe.enabled or model.config.mhc.streams > 1)
        self._has_graph = self.device.type == "cuda" and is_plain
        self._graph: DecodeGraph | None = None

    @classmethod
    @torch.no_grad()
    def from_model(
        cls, model: Transformer, backend: str | None = None, *, fused: bool = True, dtype: torch.dtype = torch.float32
    ) -> "PackedTransformer":
        """Pack a model on the device where it is. ValueError for a backend that does not exist."""
        return cls(model, backend, fused, dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm. Positions continue those in the cache. ValueError past max_seq_len."""
        return self.body.run_blocks(self.embed(tokens), cache)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] to logits [..., V]."""
        return nn.functional.linear(hidden, self.head.to(hidden.dtype))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens [B, T] into the cache; logits [B, V] after the last of them.

        One token of each of several rows (CacheRows) takes native code or the graph, like one token of one row.
        """
        rows = cache.rows if isinstance(cache, CacheRows) else [cache]
        if tokens.shape[1] == 1 and self._has_graph:
            return self._replayed(tokens, cache, rows)
        if self._native is None or len(tokens) != len(rows) or cache.dtype != torch.float32:
            return self._read(tokens, cache)
        if tokens.shape[1] == 1:
            parts = ([row.length for row in rows], [row.keys[:, 0] for row in rows], [row.values[:, 0] for row in rows])
            _, logits = self._native.decode(tokens[:, 0].tolist(), *parts)
            cache.advance(1)
            return logits
        return torch.stack([self._native.unembed(hidden) for hidden in self(tokens, cache)[:, -1]])

    @property
    def bytes(self) -> int:
        """Memory of the weights: packed and float, embedding and head; one of those when they are tied."""
        floats = {id(matrix): matrix.numel() * matrix.element_size() for matrix in (self.embedding, self.head)}
        return sum(projection.bytes for projection in self.projections) + sum(floats.values())

    def embed(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.embedding).to(self.dtype)

    def _replayed(self, tokens: Tensor, cache: KVCache, rows: Sequence[KVCache]) -> Tensor:
        memory = rows[0].memory or cache
        if isinstance(memory, CacheRows):
            return self._read(tokens, cache)
        if self._graph is None or not self._graph.fits(memory):
            self._graph = DecodeGraph(self._read, memory)
        logits = self._graph.next_logits(tokens, rows)
        cache.advance(1)
        return logits

    def _read(self, tokens: Tensor, cache: KVCache) -> Tensor:
        return self.logits(self(tokens, cache)[:, -1])

    def _native_decoder(self) -> NativeDecoder | None:
        """The whole-token decoder of the CPU backend, where machine and model have what it needs."""
        body, config = self.body, self.config
        rest = self.embedding, self.head, body.norm.weight, body.cos, body.sin
        try:
            if self.dtype != torch.float32:
                raise Unsupported(f"activations of {self.dtype}")
            layers = [decoder_layer(block) for block in body.blocks]
            heads = {"n_heads": config.n_heads, "n_kv_heads": config.n_kv_heads}
            return NativeDecoder(layers, *rest, **heads, eps=config.norm_eps)
        except Unsupported as reason:
            report_fallback("whole tokens", "cpu", str(reason))
            return None


def decoder_layer(block: nn.Module) -> DecoderLayer:
    """What the C decoder needs of a packed block. Unsupported names the part that it has no form of."""
    assert isinstance(block, Block)
    attention, feed_forward = block.attention, block.feed_forward
    if block.delta is not None:
        raise Unsupported("gated DeltaNet layers")
    if block.attention_mix is not None:
        raise Unsupported("hyper-connections (mHC)")
    if not isinstance(feed_forward, FeedForward):
        raise Unsupported("mixtures of experts (MoE)")
    _require_only(block, "blocks", {"attention_norm", "attention", "ffn_norm", "feed_forward"})
    assert attention is not None
    if attention.gated:
        raise Unsupported("gated attention")
    _require_only(attention, "attention", {"q_norm", "k_norm", "sub_norm"})
    projections = attention.qkv, attention.out, feed_forward.gate_up, feed_forward.down
    qkv, wo, gate_up, down = (p.weight for p in projections if isinstance(p, PackedProjection))
    norms = attention.q_norm, attention.k_norm, attention.sub_norm, feed_forward.sub_norm
    some = (None if norm is None else norm.weight for norm in norms)
    return DecoderLayer(block.attention_norm.weight, qkv, wo, block.ffn_norm.weight, gate_up, down, *some)


def _require_only(module: nn.Module, kind: str, known: set[str]) -> None:
    if others := {name for name, _ in module.named_children()} - known:
        raise Unsupported(f"{kind} with {', '.join(sorted(others))}")


def _smallest(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in float16 where that loses nothing (one read from a GGUF file), else in `dtype`; a copy."""
    if weight.device.type == "cpu" and dtype == torch.float32:
        half = weight.to(torch.float16)
        if torch.equal(half.to(weight.dtype), weight):
            return half
    return weight.to(dtype, copy=True)
