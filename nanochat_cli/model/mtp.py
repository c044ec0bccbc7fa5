"""Multi-token prediction: modules beside the model that predict tokens further ahead, for training and for drafts.

    heads    head i: unembedding · BitLinear(RMSNorm(h_t)) predicts token t + 2 + i      (arXiv:2404.19737, small heads)
    shared   the model's own logits at t are also scored against t + 2 …, with a weight that falls to 0
    nextn    a block on BitLinear([RMSNorm(emb(t + 1)), RMSNorm(h_t)]) predicts token t + 2  (arXiv:2412.19437)

h_t is the hidden state after the final norm, and the unembedding is the model's. None of this is part of the model: not
of its parameter count, its headline loss or its export.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.config.sections.mtp import MTPConfig
from nanochat_cli.model.bitlinear import BitLinear, requantize
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.transformer import Block, Transformer, init_linears

IGNORE = -100
SMALLEST_WEIGHT = 0.01


def build_mtp(model: ModelConfig, mtp: MTPConfig) -> "MTP | None":
    """None when it is off."""
    return MTP(model, mtp) if mtp.enabled else None


def block_config(config: ModelConfig) -> ModelConfig:
    """Of the one block of `nextn`: attention and a dense feed-forward around a plain residual."""
    values = config.model_dump()
    gate = config.resolved_attention_gate
    plain = {"mhc": {}, "deltanet": {}, "moe": {}, "n_layers": 1, "attention_gate": gate}
    return ModelConfig.model_validate({**values, **plain})


class MTPHead(nn.Module):
    """hidden [..., C] to hidden [..., C] of a token further ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.projection = BitLinear(config.dim, config.dim, config.quant)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.projection(self.norm(hidden))


class NextN(nn.Module):
    """hidden [B, T, C] and embeddings of the tokens after them [B, T, C] to hidden [B, T, C] one token ahead."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_norm = RMSNorm(config.dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.projection = BitLinear(2 * config.dim, config.dim, config.quant)
        self.block = Block(block_config(config), 0)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, hidden: Tensor, embedded: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        joined = torch.cat((self.embedding_norm(embedded), self.hidden_norm(hidden)), dim=-1)
        return self.norm(self.block(self.projection(joined), cos, sin, cache))


class MTP(nn.Module):
    """The modules of one kind. config: [mtp]."""

    def __init__(self, model: ModelConfig, config: MTPConfig) -> None:
        super().__init__()
        self.config, self.model_config = config, model
        n = config.n_tokens if config.kind == "heads" else 0
        self.heads = nn.ModuleList(MTPHead(model) for _ in range(n))
        self.nextn = NextN(model) if config.kind == "nextn" else None
        with torch.no_grad():
            init_linears(self.linears(), model)
        self.requantize()

    @property
    def n_tokens(self) -> int:
        """How many tokens beyond the next one are predicted."""
        return 1 if self.config.kind == "nextn" else self.config.n_tokens

    def weights(self, progress: float) -> list[float]:
        """Of each token's loss. progress: share of the run that is done, 0 to 1."""
        fade = 1.0 if self.config.kind == "shared" and self.config.fade is None else self.config.fade
        factor = 1.0 if fade is None else max(1 - progress / fade, 0.0)
        decay = self.config.decay
        return [factor * self.config.weight * max(decay**i, SMALLEST_WEIGHT) for i in range(self.n_tokens)]

    def hidden_states(self, model: Transformer, hidden: Tensor, next_tokens: Tensor) -> list[Tensor]:
        """Per token ahead, what the unembedding is multiplied with: [B, T, C] each.

        hidden: [B, T, C], after the final norm; next_tokens: int64 [B, T], the token after each position.
        """
        if self.config.kind == "heads":
            return [head(hidden) for head in self.heads]
        if self.nextn is None:
            return [hidden] * self.n_tokens
        length = hidden.shape[1]
        embedded = model.embedding(next_tokens.clamp(min=0))
        return [self.nextn(hidden, embedded, model.cos[:length], model.sin[:length])]

    def linears(self) -> Iterator[tuple[str, BitLinear]]:
        for name, module in self.named_modules():
            if isinstance(module, BitLinear):
                yield name, module

    def requantize(self) -> None:
        """After an optimizer step or a load."""
        requantize(layer for _, layer in self.linears())


def shifted_targets(targets: Tensor, by: int) -> Tensor:
    """targets int64 [B, T] of the next token, moved to those `by` tokens further; -100 where there is none."""
    moved = torch.full_like(targets, IGNORE)
    if by < targets.shape[1]:
        moved[:, :-by] = targets[:, by:]
    return moved
