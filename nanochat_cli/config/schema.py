"""The configuration: one pydantic model per component, `extra="forbid"`, no torch import.

A section here is the argument of one component: `[model]` of `model.Transformer`, `[optim]` of
`optim.build_optimizer`, and so on. Presets hold the values; the defaults below are only those that
are true for every preset. Cross-field rules that need no data live in the validators.
"""

from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from nanochat_cli.config.grpo_schema import GRPOConfig
from nanochat_cli.config.section import Section

ScaleGranularity = Literal["row", "tensor", 256, 128, 64]


class RunConfig(Section):
    name: str | None = Field(default=None, description="folder under run.dir; default: preset name and a counter")
    dir: Path = Field(default=Path("runs"), description="where runs are kept")
    seed: int = Field(default=1337, ge=0, lt=2**63)


class QuantConfig(Section):
    """Ternary quantisation of the linear layers of the blocks (arXiv:2402.17764)."""

    enabled: bool = Field(default=True, description="false: float linears (the twin that QAT is measured against)")
    scale: ScaleGranularity = Field(
        default="row", description="one scale per output row, per tensor, or per N inputs of a row"
    )
    activations: bool = Field(default=True, description="int8 per-token activations; false: weights only")


class MHCConfig(Section):
    """Manifold-constrained hyper-connections in their exact form, mHC-lite (arXiv:2512.24880, 2601.05732)."""

    streams: Literal[1, 2, 4] = Field(default=1, description="residual streams; 1: the plain residual")
    dynamic: bool = Field(default=True, description="mixing depends on the token; false: the same for every token")
    init: Literal["identity", "balanced", "high-entropy", "layer-dependent"] = Field(
        default="identity", description="what the mixing of streams starts from"
    )
    gate_init: PositiveFloat = Field(default=0.01, description="initial gate of the token-dependent terms")


class DeltaNetConfig(Section):
    """Layers of gated DeltaNet in place of attention, in the form of Qwen3.5 (arXiv:2412.06464)."""

    ratio: float = Field(default=0.0, ge=0, le=1, description="share of layers that are DeltaNet, spread evenly")
    pattern: str | None = Field(
        default=None, pattern="^[DA]+$", description="D (DeltaNet) and A (attention), repeated over the layers"
    )
    n_heads: PositiveInt | None = Field(default=None, description="default n_heads of the model")
    head_dim: PositiveInt | None = Field(default=None, description="default head_dim of the model")
    conv_kernel: int = Field(default=4, ge=2, le=8, description="tokens that the causal convolution sees")
    chunk: PositiveInt = Field(default=64, description="tokens that training computes at a time")
    backend: Literal["auto", "torch", "fla"] = Field(
        default="auto", description="auto: flash-linear-attention on CUDA when it is installed"
    )


class MoEConfig(Section):
    """Mixture of experts in the form of Mixtral (arXiv:2401.04088); every expert has the width ffn_dim."""

    enabled: bool = False
    experts: int = Field(default=8, ge=2)
    active: PositiveInt = Field(default=2, description="experts that a token goes through")
    balance: Literal["loss", "bias", "none"] = Field(
        default="loss", description="auxiliary loss, or a selection bias without a loss (arXiv:2408.15664)"
    )
    loss_weight: NonNegativeFloat = Field(default=0.01, description="of the auxiliary loss (arXiv:2101.03961)")
    bias_rate: PositiveFloat = Field(default=1e-3, description="change of the selection bias per step")
    capacity_factor: NonNegativeFloat = Field(
        default=0.0, description="tokens an expert takes at most, in units of an even load; 0: all"
    )
    shared: bool = Field(default=False, description="one more expert that every token goes through")


class ModelConfig(Section):
    vocab_size: PositiveInt = 32768
    dim: PositiveInt = 768
    n_layers: PositiveInt = 12
    n_heads: PositiveInt = 12
    n_kv_heads: PositiveInt = 4
    head_dim: PositiveInt | None = Field(default=None, description="default dim / n_heads")
    ffn_dim: PositiveInt | None = Field(
        default=None, description="SwiGLU width; default ffn_mult × dim rounded up to 256"
    )
    ffn_mult: PositiveFloat = 8 / 3
    max_seq_len: int = Field(default=2048, ge=1, le=2**18)
    rope_theta: PositiveFloat = 10000.0
    norm_eps: PositiveFloat = 1e-5
    tie_embeddings: bool = False
    qk_norm: bool = Field(default=False, description="RMSNorm on q and k per head, before RoPE (arch qwen3)")
    qk_norm_init: PositiveFloat = Field(default=1.2, description="initial weight of the q and k norms")
    attention_gate: bool | None = Field(
        default=None, description="sigmoid gate on the output of attention (arch qwen35); default: in hybrids"
    )
    sub_norm: bool = Field(default=False, description="RMSNorm before wo and w_down (arch bitnet)")
    embedding_std: PositiveFloat = 0.02
    head_std: NonNegativeFloat = 0.02
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
    def _shapes_fit(self) -> "ModelConfig":
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
    def _parts_fit(self) -> "ModelConfig":
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


class DataConfig(Section):
    path: Path | None = Field(default=None, description="folder of shards written by `nanochat tokenize`")
    source: str = Field(default="stdlib", description="corpus tokenised into the cache when data.path is not given")
    glob: str = Field(default="**/*", description="files taken from a source folder")
    text_field: str = Field(default="text", description="field of records; dots for one inside another")
    streaming: bool = Field(default=False, description="read an hf: source without storing it first")
    max_bytes: PositiveInt | None = Field(default=None, description="stop after this many bytes of documents")
    val_fraction: float = Field(default=0.02, gt=0, lt=0.5, description="share held out, in whole clusters")
    workers: PositiveInt | None = Field(default=None, description="encoding processes; default: all cores")


class TokenizerConfig(Section):
    pre: Literal["gpt-2", "llama3", "qwen2"] = Field(
        default="gpt-2", description="pre-tokenizer, by its llama.cpp name"
    )
    max_token_length: PositiveInt = Field(default=24, le=32)
    train_bytes: PositiveInt = Field(default=32_000_000, description="bytes of the corpus that BPE training reads")
    path: Path | None = Field(default=None, description="an existing tokenizer.json to use instead of training one")


class TrainConfig(Section):
    total_steps: PositiveInt = 1000
    time_budget: PositiveFloat | None = Field(
        default=None,
        description="seconds of training; total_steps is lowered to what fits, once, after a few timed steps",
    )
    batch_size: PositiveInt = Field(default=8, description="sequences per micro-batch")
    grad_accum: PositiveInt = Field(default=1, description="micro-batches per step")
    seq_len: PositiveInt = 256
    grad_clip: NonNegativeFloat = Field(default=1.0, description="global gradient norm over every parameter; 0: off")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss: NonNegativeFloat = 0.0
    entropy_weight: NonNegativeFloat = 0.0
    loss_chunk: PositiveInt = Field(default=512, description="tokens whose logits exist at a time")
    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:N")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="auto: bf16 autocast on CUDA, fp32 on CPU"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="auto: where a compiler exists and the run is long enough"
    )
    forward: Literal["auto", "float", "int8"] = Field(
        default="auto",
        description="product of the ternary layers: int8 kernels or exact floats, equal in value; auto: the faster one",
    )
    grad_input: Literal["exact", "fp8"] = Field(
        default="exact", description="fp8: gradients of the ternary layers' inputs in float8, on GPUs that have it"
    )
    gradient_checkpointing: bool = False
    log_interval: PositiveInt = 10
    spike_factor: PositiveFloat = Field(
        default=4.0, description="skip a step whose gradient norm exceeds this × its running mean"
    )
    max_skipped_steps: PositiveInt = Field(
        default=20, description="consecutive steps that are not finite before the run stops"
    )


class EvalConfig(Section):
    interval: PositiveInt = 250
    max_tokens: PositiveInt = Field(default=262_144, description="held-out tokens read by a periodic evaluation")
    final_max_tokens: PositiveInt | None = Field(
        default=None, description="bound of the final evaluation; default: all"
    )
    batch_size: PositiveInt = 16


class GaLoreConfig(Section):
    """Gradient low-rank projection of the matrices (arXiv:2403.03507, 2504.20437); GUM (2510.17802) with `unbiased`."""

    enabled: bool = False
    rank: PositiveInt = Field(default=256, description="of the subspace; at most the smaller side of a matrix")
    update_freq: PositiveInt = Field(default=200, description="steps between new subspaces")
    scale: PositiveFloat | None = Field(
        default=None, description="factor on the update from the subspace; none: 1 with Muon, 0.25 with AdamW"
    )
    unbiased: bool = Field(default=False, description="GUM: some matrices are updated in full, the rest compensated")
    full_rank_share: float = Field(default=0.25, gt=0, le=1, description="share of matrices that GUM updates in full")
    oversampling: NonNegativeInt = Field(default=8, description="extra columns of the randomised SVD")
    power_iterations: NonNegativeInt = Field(default=1, description="of the randomised SVD")
    release_gradients: bool = Field(
        default=False, description="project gradients in the backward pass, so that whole ones are never held together"
    )


class OptimConfig(Section):
    matrix: Literal["muon", "adamw"] = Field(default="muon", description="optimizer of the 2-D ternary latents")
    other: Literal["adamw", "lion"] = Field(default="adamw", description="optimizer of embeddings, head, norms")
    lr: PositiveFloat = Field(default=0.02, description="matrix learning rate")
    embedding_lr: PositiveFloat = 0.3
    head_lr: PositiveFloat = 0.004
    scalar_lr: PositiveFloat = 0.01
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_nesterov: bool = True
    muon_ns_steps: int = Field(default=5, ge=1, le=10)
    muon_coefficients: Literal["keller-jordan", "polar-express"] = "keller-jordan"
    muon_equilibrate: bool = Field(
        default=False, description="equal row norms before orthogonalising (arXiv:2603.28254)"
    )
    muon_variance_beta: float = Field(
        default=0.0, ge=0, lt=1, description="NorMuon's running row variance (arXiv:2510.05491); 0: off"
    )
    muon_momentum_start: float | None = Field(default=None, ge=0, lt=1, description="momentum of the first step")
    muon_momentum_warmup: int = Field(default=0, ge=0, description="steps from muon_momentum_start to muon_momentum")
    betas: tuple[float, float] = (0.8, 0.95)
    eps: PositiveFloat = 1e-10
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled, on matrices only")
    cautious_weight_decay: bool = False
    lion_lr_mult: PositiveFloat = Field(default=0.1, description="Lion uses this × the AdamW learning rate of a group")
    lion_weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["wsd", "two_stage", "cosine", "constant"] = "wsd"
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(default="linear", description="shape of WSD's decay")
    eight_bit: bool = Field(
        default=False, description="keep optimizer state as int8 with a scale per block (arXiv:2509.23106)"
    )
    eight_bit_other: bool = Field(
        default=True, description="with eight_bit: that of embeddings, head and norms too, not the matrices' alone"
    )
    state_block: Literal[128, 256, 2048] = Field(default=256, description="elements that share a scale")
    galore: GaLoreConfig = Field(default_factory=GaLoreConfig)
    warmup_steps: int = Field(default=20, ge=0)
    stable_ratio: float = Field(default=0.4, ge=0, le=1, description="share of the run before the decay starts")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)


class BigramInitConfig(Section):
    """Fit embedding and head to the corpus' bigram counts before training; see training/bigram_init.py."""

    steps: NonNegativeInt = Field(default=0, description="full-corpus gradient steps; 0: off")
    embedding_lr: PositiveFloat = 0.2
    head_lr: PositiveFloat = 0.02


class MTPConfig(Section):
    """Multi-token prediction: an auxiliary loss on tokens further ahead (arXiv:2404.19737, 2412.19437)."""

    enabled: bool = False
    kind: Literal["heads", "shared", "nextn"] = Field(
        default="heads", description="a small head per token, the model's own logits, or one more block"
    )
    n_tokens: int = Field(default=3, ge=1, le=4, description="tokens beyond the next one (nextn: always 1)")
    weight: NonNegativeFloat = Field(default=0.2, description="of the auxiliary losses together")
    decay: float = Field(default=0.5, gt=0, le=1, description="weight of a token relative to the one before")


class ColliderConfig(Section):
    """Token filtering in the backward pass (Collider, arXiv:2502.00340): the forward pass is that of every token."""

    enabled: bool = False
    sparsity: float = Field(default=0.35, ge=0, lt=1, description="share of a micro-batch's tokens that are filtered")
    threshold: float = Field(
        default=1.0, gt=0, le=1, description="a token whose min-max-normalised importance reaches this is kept"
    )
    score: Literal["ce", "excess", "entropy"] = Field(
        default="ce", description="importance: cross-entropy, cross-entropy over a reference model's, or entropy"
    )
    reference: Path | None = Field(default=None, description="run whose model gives the scores that `excess` subtracts")
    scores: Path | None = Field(default=None, description="file of `nanochat score`, read instead of computing")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps before anything is filtered")

    @property
    def reference_in_use(self) -> Path | None:
        """The run whose model has to be loaded, if any."""
        used = self.enabled and self.score == "excess" and self.scores is None
        return self.reference if used else None

    @model_validator(mode="after")
    def _excess_needs_a_reference(self) -> "ColliderConfig":
        if self.enabled and self.score == "excess" and self.reference is None and self.scores is None:
            raise ValueError("score = excess needs reference (a run) or scores (a file of `nanochat score`)")
        return self


class LoaderConfig(Section):
    """How batches reach the trainer; what they hold does not depend on it."""

    enabled: bool = Field(default=False, description="read ahead in processes of their own; false: the trainer reads")
    workers: PositiveInt = Field(default=4, description="processes that read ahead")
    prefetch: PositiveInt = Field(default=8, description="batches that are ready at most")
    on_the_fly: bool = Field(default=False, description="tokenise raw text while training instead of reading shards")


class FireConfig(Section):
    """Reinitialisation of matrices to their nearest isometry (FIRE, arXiv:2602.08040)."""

    enabled: bool = False
    steps: list[PositiveInt] = Field(default=[], description="steps after which it happens, whatever the trigger")
    trigger: Literal["steps", "phase", "dormant", "isometry"] = Field(
        default="steps",
        description="listed steps only; also when a run is resumed on other data; also on a measured share of dormant "
        "units or deviation from isometry",
    )
    interval: PositiveInt = Field(default=500, description="steps between measurements of a measured trigger")
    dormant_fraction: float = Field(default=0.3, gt=0, le=1, description="share of dormant units that triggers")
    dormant_threshold: NonNegativeFloat = Field(
        default=0.025, description="activity below which a unit is dormant, in units of its layer's mean"
    )
    isometry_deviation: PositiveFloat = Field(
        default=2.0, description="mean deviation that triggers, in units of that of random matrices of these shapes"
    )
    method: Literal["newton-schulz", "polar-express"] = "newton-schulz"
    target: PositiveFloat = Field(default=1e-6, description="deviation from isometry at which the iteration stops")
    max_iterations: PositiveInt = 60
    scale: Literal["paper", "preserve_norm", "fan_in"] = Field(
        default="preserve_norm", description="of the isometry: sqrt(out / in), the old norm, or 1 / sqrt(in)"
    )
    layers: list[str] = Field(
        default=["*"], min_length=1, description="names of linear layers of the blocks, wildcards allowed"
    )
    rewarm_steps: NonNegativeInt = Field(default=50, description="steps in which the learning rate climbs again")

    @model_validator(mode="after")
    def _something_triggers(self) -> "FireConfig":
        if self.enabled and self.trigger == "steps" and not self.steps:
            raise ValueError("fire.enabled = true with fire.trigger = steps needs fire.steps, such as [1000]")
        return self


class CheckpointConfig(Section):
    interval: PositiveInt = 500
    keep_last: PositiveInt = 2
    keep_best: bool = Field(default=True, description="also keep the checkpoint with the lowest held-out bits per byte")


class TelemetryConfig(Section):
    interval: PositiveInt = Field(
        default=50, description="steps between ternary statistics (flip rate, zeros, margins)"
    )
    tensorboard: bool = True
    phases: bool = Field(
        default=False, description="also log how long forward, backward and optimizer take (`time/…_ms`)"
    )


class ExportConfig(Section):
    type: Literal["auto", "tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32"] = "auto"
    head: Literal["f16", "f32"] = Field(default="f16", description="type of embeddings and head")
    verify: bool = True


class Config(Section):
    """The whole configuration; what `config.toml` of a run holds."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    bigram_init: BigramInitConfig = Field(default_factory=BigramInitConfig)
    mtp: MTPConfig = Field(default_factory=MTPConfig)
    collider: ColliderConfig = Field(default_factory=ColliderConfig)
    loader: LoaderConfig = Field(default_factory=LoaderConfig)
    fire: FireConfig = Field(default_factory=FireConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @model_validator(mode="after")
    def _bigrams_need_two_matrices(self) -> "Config":
        if self.bigram_init.steps and self.model.tie_embeddings:
            raise ValueError(
                "bigram_init.steps needs model.tie_embeddings = false: one matrix cannot say which token comes first"
            )
        return self

    @model_validator(mode="after")
    def _filtering_has_a_rule(self) -> "Config":
        if self.collider.enabled and self.model.is_hybrid:
            raise ValueError(
                "collider.enabled needs model.deltanet off: a convolution and a state mix tokens, and there is no rule "
                "for what a filtered token leaves in them"
            )
        if self.collider.enabled and self.collider.scores is not None and self.loader.on_the_fly:
            raise ValueError("collider.scores are those of shards: they do not go with loader.on_the_fly = true")
        return self

    @model_validator(mode="after")
    def _sequence_fits(self) -> "Config":
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len = {self.train.seq_len} is longer than model.max_seq_len = {self.model.max_seq_len}"
            )
        return self
