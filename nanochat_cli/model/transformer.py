"""The decoder: embedding, n blocks, final norm, head.

A block mixes tokens by attention or gated DeltaNet, has a dense feed-forward or a mixture of experts, and writes into
one residual stream or several.

Knows token ids in and hidden states or logits out. Knows nothing of losses, tokenizers or files; the
training loss reads `hidden` and `unembedding` so that it can avoid holding all logits.
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.model.attention import Attention
from nanochat_cli.model.bitlinear import BitLinear, requantize
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.deltanet import GatedDeltaNet
from nanochat_cli.model.documents import document_mask
from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.hyper_connections import (
    HyperConnection,
    collapse_streams,
    expand_streams,
    read_streams,
    write_streams,
)
from nanochat_cli.model.moe import ExpertLinear, MoE
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import rope_table
from nanochat_kernels import FOUR_BIT, PLANE, Backward, Form, choose_form


class Block(nn.Module):
    """Pre-norm mixing of tokens and feed-forward around a residual stream x [B, T, C], or n streams [B, T, n, C].

    The one description of it: written in operations, which are those of training or, in a packed copy, of inference.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        is_delta = config.delta_layers[layer]
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = None if is_delta else Attention(config, layer)
        self.delta = GatedDeltaNet(config, layer) if is_delta else None
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoE(config) if config.moe.enabled else FeedForward(config)
        several = config.mhc.streams > 1
        self.attention_mix = HyperConnection(config, layer) if several else None
        self.ffn_mix = HyperConnection(config, layer) if several else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if self.attention_mix is None or self.ffn_mix is None:
            x = x + self.mix_tokens(x, cos, sin, cache, mask)
            return x + self.feed_forward(x, self.ffn_norm)
        pre, post, _, res = self.attention_mix(x)
        x = write_streams(x, self.mix_tokens(read_streams(x, pre), cos, sin, cache, mask), post, res)
        pre, post, _, res = self.ffn_mix(x)
        return write_streams(x, self.feed_forward(read_streams(x, pre), self.ffn_norm), post, res)

    def mix_tokens(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, mask: Tensor | None = None
    ) -> Tensor:
        """Attention or DeltaNet of the normed x, [B, T, C]."""
        if self.attention is not None:
            return self.attention(x, self.attention_norm, cos, sin, cache, mask)
        assert self.delta is not None
        return self.delta(x, self.attention_norm, cache)


def init_linears(
    linears: Iterable[tuple[str, BitLinear]], config: ModelConfig, generator: torch.Generator | None = None
) -> None:
    """Normal latents of named layers; those that write into the residual stream shrink with 1 / sqrt(2 L)."""
    output_std = config.output_init_scale * config.matrix_std / math.sqrt(2 * config.n_layers)
    for name, layer in linears:
        writes_residual = name.endswith((".wo", ".w_down", ".w_out"))
        nn.init.normal_(layer.weight, std=output_std if writes_residual else config.matrix_std, generator=generator)


def use_forms(
    linears: Iterable[tuple[str, BitLinear]],
    form: Form | None = None,
    backward: Backward = "exact",
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compute ternary products in the forms that `forms_of` chooses, with codes in dtype, from now on."""
    for _, layer in linears:
        if layer.quant.enabled:
            layer.use_form(*forms_of(layer, form, backward, layer.weight.device), dtype)


def forms_of(layer: BitLinear, form: Form | None, backward: Backward, device: torch.device) -> tuple[Form, Backward]:
    """Of a ternary layer's product, by default (None) the measured faster one, and of its gradients.

    What cannot be int8 stays float; experts do, with exact gradients. ConfigError for what cannot be NVFP4.
    """
    if not layer.quant.activations or isinstance(layer, ExpertLinear):
        return "float", "exact"
    if form in FOUR_BIT:
        if layer.in_features % 16:
            raise ConfigError(
                f"train.forward = {form} rounds blocks of 16 inputs, and a layer has {layer.in_features}: use auto"
            )
        return form, backward
    if layer.in_features % PLANE:
        return "float", backward
    if form is None:  # the codes of an int8 backward pass are there for the forward pass too, and faster
        form = "int8" if backward == "int8" else choose_form(device, layer.in_features, layer.out_features)
    return form, backward


class Transformer(nn.Module):
    """tokens int64 [B, T] to hidden float [B, T, C]; `logits` maps hidden to [B, T, V]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        cos, sin = rope_table(config.max_seq_len, config.resolved_head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.gradient_checkpointing = False
        self.document_end: int | None = None
        """The id that ends a document where rows hold several, and attention does not cross them; None: it does."""
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Normal latents; the projections that write into the residual stream shrink with 1 / sqrt(2 L)."""
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std, generator=generator)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=self.config.head_std, generator=generator)
        init_linears(self.linears(), self.config, generator)
        for module in self.modules():
            if isinstance(module, GatedDeltaNet):
                module.init_weights(self.config.matrix_std, generator)
            elif isinstance(module, MoE):
                nn.init.normal_(module.router.weight, std=self.config.matrix_std, generator=generator)
        self.requantize()

    def embed(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] to [B, T, C]."""
        return self.embedding(tokens)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states after the final norm. Positions continue those in the cache. ValueError past max_seq_len."""
        if self.document_end is None or cache is not None:
            return self.run_blocks(self.embed(tokens), cache)
        return self.run_blocks(self.embed(tokens), documents=document_mask(tokens, self.document_end))

    def run_blocks(
        self, embedded: Tensor, cache: KVCache | None = None, documents: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `forward`, from embedded tokens [B, T, C]. documents: `document_mask` of rows that hold several."""
        length = embedded.shape[1]
        end = length if cache is None else cache.length + length
        if end > self.config.max_seq_len:
            raise ValueError(f"position {end} is past max_seq_len = {self.config.max_seq_len}")
        tables = self.cos, self.sin
        cos, sin = (table[:length] if cache is None else cache.next_rows(table, length) for table in tables)
        mask = None
        if documents is not None:
            mask, positions = documents
            cos, sin = cos[positions], sin[positions]
        streams = self.config.mhc.streams
        x = expand_streams(embedded, streams) if streams > 1 else embedded
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, cos, sin, None, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, cache, mask)
        if cache is not None:
            cache.advance(length)
        return self.norm(collapse_streams(x).to(embedded.dtype) if streams > 1 else x)

    @property
    def unembedding(self) -> Tensor:
        """The matrix [V, C] whose product with a hidden state gives the logits."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., C] to logits [..., V]."""
        return nn.functional.linear(hidden, self.unembedding.to(hidden.dtype))

    @torch.no_grad()
    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens [B, T] into the cache; logits [B, V] after the last of them."""
        return self.logits(self(tokens, cache)[:, -1])

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the float weights and activations."""
        return self.embedding.weight.dtype

    def linears(self) -> Iterator[tuple[str, BitLinear]]:
        """Every linear layer of the blocks with its dotted name, in order."""
        for name, module in self.named_modules():
            if isinstance(module, BitLinear):
                yield name, module

    def ternary_layers(self) -> Iterator[tuple[str, BitLinear]]:
        """Those of `linears` that are quantised."""
        return ((name, layer) for name, layer in self.linears() if layer.quant.enabled)

    def hyper_connections(self) -> Iterator[tuple[str, HyperConnection]]:
        """Those of every block in order, attention's before the feed-forward's."""
        for name, module in self.named_modules():
            if isinstance(module, HyperConnection):
                yield name, module

    def mixtures(self) -> Iterator[tuple[str, MoE]]:
        """Every mixture of experts with its dotted name, in order."""
        for name, module in self.named_modules():
            if isinstance(module, MoE):
                yield name, module

    def use_forms(self, form: Form | None = None, backward: Backward = "exact") -> None:
        """Compute the ternary products of training in this form, or in the one measured faster for each shape (None).

        The values are the same. Layers that read one input take one form; what cannot be int8 stays float.
        backward: the number format of the gradients' products.
        """
        use_forms(self.linears(), form, backward)

    def requantize(self) -> None:
        """Refresh every effective weight; to be called after an optimizer step or a load."""
        requantize(layer for _, layer in self.linears())
