"""`[optim]` and `[optim.galore]`: optimizers, learning rates and their schedule."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from nanochat_cli.config.sections.section import Section


class GaLoreConfig(Section):
    """Gradient low-rank projection of the matrices (arXiv:2403.03507, 2504.20437); GUM (2510.17802) with `unbiased`."""

    enabled: bool = Field(default=False, description="keep the matrices' state in a low-rank subspace of the gradients")
    rank: PositiveInt = Field(default=256, description="rank of the subspace, at most the smaller side of a matrix")
    update_freq: PositiveInt = Field(default=200, description="steps between new subspaces")
    scale: PositiveFloat | None = Field(
        default=None, description="factor α on the update from the subspace; default: 1 with Muon, 0.25 with AdamW"
    )
    unbiased: bool = Field(default=False, description="GUM: some matrices are updated in full, the rest compensated")
    full_rank_share: float = Field(default=0.25, gt=0, le=1, description="share q of matrices that GUM updates in full")
    oversampling: NonNegativeInt = Field(default=8, description="extra columns of the randomised SVD")
    power_iterations: NonNegativeInt = Field(default=1, description="power iterations of the randomised SVD")
    release_gradients: bool = Field(
        default=False, description="project gradients during the backward pass, so that full ones are never all held"
    )

    def held(self) -> dict[str, object]:
        if not self.enabled:
            return {"enabled": False}
        gum = {"full_rank_share": self.full_rank_share, "update_freq": self.update_freq} if self.unbiased else {}
        return {"enabled": True, "rank": self.rank, "unbiased": self.unbiased, **gum}


class OptimConfig(Section):
    matrix: Literal["muon", "adamw"] = Field(default="muon", description="optimizer of the 2-D ternary latents")
    other: Literal["adamw", "lion"] = Field(default="adamw", description="optimizer of embedding, head and norms")
    lr: PositiveFloat = Field(default=0.02, description="peak learning rate of the matrices")
    embedding_lr: PositiveFloat = Field(default=0.3, description="peak learning rate of the embedding")
    head_lr: PositiveFloat = Field(default=0.004, description="peak learning rate of the head")
    scalar_lr: PositiveFloat = Field(default=0.01, description="peak learning rate of norms and other vectors")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="momentum of Muon")
    muon_nesterov: bool = Field(default=True, description="Nesterov momentum in Muon")
    muon_ns_steps: int = Field(default=5, ge=1, le=10, description="iterations that orthogonalise Muon's update")
    muon_coefficients: Literal["keller-jordan", "polar-express", "cans"] = Field(
        default="keller-jordan",
        description="polynomials of these iterations (polar-express: arXiv:2505.16932; cans, for 3 or 4: 2506.10935)",
    )
    muon_format: Literal["auto", "fp32", "bf16", "int8"] | None = Field(
        default=None,
        description="number format of these iterations; auto: the fastest here; default: bf16 on CUDA, else fp32",
    )
    muon_equilibrate: bool = Field(
        default=False, description="equalise row norms before orthogonalising (arXiv:2603.28254)"
    )
    muon_variance_beta: float = Field(
        default=0.0, ge=0, lt=1, description="decay of NorMuon's running row variance (arXiv:2510.05491); 0: off"
    )
    muon_momentum_start: float | None = Field(default=None, ge=0, lt=1, description="Muon's momentum in the first step")
    muon_momentum_warmup: int = Field(
        default=0, ge=0, description="steps from muon_momentum_start to muon_momentum, at most a third of the run"
    )
    betas: tuple[float, float] = Field(default=(0.8, 0.95), description="decay of AdamW's two moments")
    eps: PositiveFloat = Field(default=1e-10, description="ε of AdamW")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay of the matrices")
    cautious_weight_decay: bool = Field(default=False, description="decay a weight only if Muon's update has its sign")
    lion_lr_mult: PositiveFloat = Field(default=0.1, description="Lion's learning rate over AdamW's for the same group")
    lion_weight_decay: NonNegativeFloat = Field(default=0.0, description="decoupled weight decay of Lion")
    schedule: Literal["wsd", "two_stage", "cosine", "constant"] = Field(
        default="wsd", description="shape of the learning rate over the run"
    )
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(default="linear", description="shape of WSD's decay")
    eight_bit: bool = Field(default=False, description="8-bit optimizer state, one scale per block (arXiv:2509.23106)")
    eight_bit_other: bool = Field(
        default=True, description="with eight_bit: also for embedding, head and norms, not only for the matrices"
    )
    state_block: Literal[128, 256, 2048] = Field(default=256, description="elements that share a scale")
    galore: GaLoreConfig = Field(default_factory=GaLoreConfig)
    warmup_steps: int = Field(default=20, ge=0, description="steps of linear warm-up, at most a fifth of the run")
    stable_ratio: float = Field(default=0.4, ge=0, le=1, description="share of the run before WSD's decay starts")
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1, description="learning rate at the end over its peak")

    def held(self) -> dict[str, object]:
        has_variance = self.muon_variance_beta > 0 and self.matrix == "muon"
        keys = {"matrix": self.matrix, "other": self.other, "muon_variance_beta": has_variance}
        keys |= {"eight_bit": self.eight_bit}
        if self.eight_bit:
            keys |= {"eight_bit_other": self.eight_bit_other, "state_block": self.state_block}
        return keys | {f"galore.{key}": value for key, value in self.galore.held().items()}
