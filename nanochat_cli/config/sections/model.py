"""`[model]` and `[model.quant]`: the shape of the transformer and its quantisation."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from nanochat_cli.config.sections.deltanet import DeltaNetConfig
from nanochat_cli.config.sections.mhc import MHCConfig
from nanochat_cli.config.sections.moe import MoEConfig
from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.size import ParameterCounts


class QuantConfig(Section):
    """Ternary quantisation of the linear layers of the blocks (arXiv:2402.17764)."""

    enabled: bool = Field(default=True, description="false: float linear layers, the twin that QAT is measured against")
    scale: Literal["row", "tensor", 256, 128, 64] = Field(
        default="row", description="one scale per output row, per tensor, or per group of that many inputs of a row"
    )
    activations: bool = Field(default=True, description="quantise activations to int8 per token; false: weights only")
    start: float = Field(default=0.0, ge=0, lt=1, description="share of the steps that train in float, at first")
    ramp: float = Field(
        default=0.0, ge=0, lt=1, description="share of the steps after them that lead from float to ternary"
    )

    @model_validator(mode="after")
    def _ends_ternary(self) -> Self:
        if self.start + self.ramp >= 1:
            raise ValueError(f"start = {self.start:g} and ramp = {self.ramp:g} leave no step that is ternary")
        return self

    @property
    def begins_in_float(self) -> bool:
        """Whether the first steps are not ternary."""
        return self.enabled and (self.start > 0 or self.ramp > 0)

    def ternary_share(self, step: int, total_steps: int) -> float:
        """λ of a step, 0-based: 0 in float, 1 when it is ternary, in between it grows by the same amount every step."""
        begin, rising = (int(share * total_steps + 1e-6) for share in (self.start, self.ramp))
        return min(1.0, max(0.0, (step - begin + 1) / (rising + 1)))

    def in_words(self) -> str:
        """What the layers of the blocks are."""
        if not self.begins_in_float:
            return "ternary" if self.enabled else "float"
        if not self.start:
            return f"from float to ternary over {self.ramp:.0%} of the steps"
        ramp = f"over {self.ramp:.0%} to " if self.ramp else ""
        return f"float for {self.start:.0%} of the steps, then {ramp}ternary"


class ModelConfig(Section):
    vocab_size: PositiveInt = Field(default=32768, description="entries of the vocabulary")
    dim: PositiveInt = Field(default=768, description="width of the residual stream")
    n_layers: PositiveInt = Field(default=12, description="number of blocks")
    n_heads: PositiveInt = Field(default=12, description="query heads, a multiple of n_kv_heads")
    n_kv_heads: PositiveInt = Field(default=4, description="key and value heads")
    head_dim: PositiveInt | None = Field(default=None, description="width of a head; default: dim / n_heads")
    ffn_dim: PositiveInt | None = Field(
        default=None, description="width of the SwiGLU; default: ffn_mult × dim, rounded up to a multiple of 256"
    )
    ffn_mult: PositiveFloat = Field(default=8 / 3, description="width of the SwiGLU over dim, if ffn_dim is not set")
    max_seq_len: int = Field(default=2048, ge=1, le=2**18, description="longest context, in tokens")
    rope_theta: PositiveFloat = Field(default=10000.0, description="base of the rotary position embedding")
    norm_eps: PositiveFloat = Field(default=1e-5, description="ε of every RMSNorm")
    tie_embeddings: bool = Field(default=False, description="one matrix as embedding and head")
    qk_norm: bool = Field(default=False, description="RMSNorm on q and k per head, before RoPE (arch qwen3)")
    qk_norm_init: PositiveFloat = Field(default=1.2, description="initial weight of the q and k norms")
    attention_gate: bool | None = Field(
        default=None, description="sigmoid gate on the output of attention (arch qwen35); default: in hybrids"
    )
    sub_norm: bool = Field(default=False, description="RMSNorm before wo and w_down (arch bitnet, embeddings tied)")
    embedding_std: PositiveFloat = Field(default=0.02, description="initial std of the embedding")
    head_std: NonNegativeFloat = Field(default=0.02, description="initial std of the head")
    matrix_std: PositiveFloat = Field(
        default=0.02, description="initial std of the latents; output projections ÷ sqrt(2 n_layers)"
    )
    output_init_scale: NonNegativeFloat = Field(
        default=1.0, description="factor on the initial std of the output projections; 0: they start at zero"
    )
    quant: QuantConfig = Field(default_factory=QuantConfig)
    mhc: MHCConfig = Field(default_factory=MHCConfig)
    deltanet: DeltaNetConfig = Field(default_factory=DeltaNetConfig)
    moe: MoEConfig = Field(default_factory=MoEConfig)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads = {self.n_heads} must be a multiple of n_kv_heads = {self.n_kv_heads}")
        if self.head_dim is None and self.dim % self.n_heads:
            raise ValueError(f"dim = {self.dim} must be a multiple of n_heads = {self.n_heads} (or set head_dim)")
        if self.resolved_head_dim % 2:
            raise ValueError(f"head_dim = {self.resolved_head_dim} must be even (RoPE rotates pairs)")
        if self.sub_norm and self.qk_norm:
            raise ValueError("sub_norm and qk_norm together fit no GGUF architecture; choose one")
        if self.quant.enabled and isinstance(self.quant.scale, int):
            for name, width in (
                ("dim", self.dim),
                ("n_heads × head_dim", self.n_heads * self.resolved_head_dim),
                ("ffn_dim", self.resolved_ffn_dim),
            ):
                if width % self.quant.scale:
                    raise ValueError(f"{name} = {width} must be a multiple of quant.scale = {self.quant.scale}")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.moe.enabled and self.moe.active > self.moe.experts:
            raise ValueError(f"moe.active = {self.moe.active} is more than moe.experts = {self.moe.experts}")
        if self.deltanet.ratio and self.deltanet.pattern:
            raise ValueError("deltanet.ratio and deltanet.pattern both place the layers; keep one")
        if self.is_hybrid and self.sub_norm:
            raise ValueError("sub_norm and deltanet together fit no GGUF architecture; choose one")
        if self.moe.enabled and self.sub_norm:
            raise ValueError("sub_norm and moe together fit no GGUF architecture; choose one")
        inner = self.delta_heads * self.delta_head_dim
        if self.is_hybrid and self.quant.enabled and isinstance(self.quant.scale, int) and inner % self.quant.scale:
            raise ValueError(f"deltanet n_heads × head_dim = {inner} must be a multiple of quant.scale")
        return self

    @property
    def delta_layers(self) -> tuple[bool, ...]:
        """Which layers are gated DeltaNet: n = round(L · ratio) of them at floor((2k + 1) · L / 2n), or the pattern."""
        count = self.n_layers
        if self.deltanet.pattern is not None:
            pattern = self.deltanet.pattern
            return tuple(pattern[layer % len(pattern)] == "D" for layer in range(count))
        n = round(count * self.deltanet.ratio)
        places = {(2 * k + 1) * count // (2 * n) for k in range(n)}
        return tuple(layer in places for layer in range(count))

    @property
    def is_hybrid(self) -> bool:
        return any(self.delta_layers)

    @property
    def delta_heads(self) -> int:
        return self.deltanet.n_heads or self.n_heads

    @property
    def delta_head_dim(self) -> int:
        return self.deltanet.head_dim or self.resolved_head_dim

    @property
    def resolved_attention_gate(self) -> bool:
        return self.is_hybrid if self.attention_gate is None else self.attention_gate

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def resolved_ffn_dim(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return -(-round(self.ffn_mult * self.dim) // 256) * 256

    def count_parameters(self) -> ParameterCounts:
        """Parameters of the model, each shared tensor once."""
        vocabulary = self.vocab_size * self.dim
        rest = ParameterCounts(embedding=vocabulary, head=0 if self.tie_embeddings else vocabulary, norms=self.dim)
        return sum((self._block_parameters(is_delta) for is_delta in self.delta_layers), rest)

    def _block_parameters(self, is_delta: bool) -> ParameterCounts:
        dim, ffn_dim, sublayer = self.dim, self.resolved_ffn_dim, self.mhc.count_parameters(self.dim)
        expert = 3 * dim * ffn_dim
        counts = sublayer + sublayer + ParameterCounts(norms=2 * dim + ffn_dim * self.sub_norm)
        counts += self.moe.count_parameters(dim, expert) if self.moe.enabled else ParameterCounts(feed_forward=expert)
        if is_delta:
            return counts + self.deltanet.count_parameters(dim, self.delta_heads, self.delta_head_dim)
        return counts + self._attention_parameters()

    def _attention_parameters(self) -> ParameterCounts:
        q_dim, kv_dim = self.n_heads * self.resolved_head_dim, self.n_kv_heads * self.resolved_head_dim
        outputs = (2 if self.resolved_attention_gate else 1) * q_dim + 2 * kv_dim
        norms = 2 * self.resolved_head_dim * self.qk_norm + q_dim * self.sub_norm
        return ParameterCounts(attention=self.dim * (outputs + q_dim), norms=norms)

    def mixing_flops(self, seq_len: int) -> float:
        """FLOPs per token, forward and backward, of attention and DeltaNet beside their matrices.

        Attention: two matmuls of H heads of width D over T / 2 keys on average. DeltaNet: its state, D² for each of H
        heads, is read twice and written once.
        """
        n_delta = sum(self.delta_layers)
        attention = 12 * (self.n_layers - n_delta) * self.n_heads * self.resolved_head_dim * seq_len / 2
        return attention + 18 * n_delta * self.delta_heads * self.delta_head_dim**2
