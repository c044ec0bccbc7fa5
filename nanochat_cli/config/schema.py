"""The whole configuration, composed of one section per component (`config.sections`). No torch import.

Presets hold the values; the defaults in the sections are those that every preset can share. A rule within a section
is checked there, one between several sections here.
"""

from typing import Self

from pydantic import Field, model_validator

from nanochat_cli.config.sections.bigram_init import BigramInitConfig
from nanochat_cli.config.sections.collider import ColliderConfig
from nanochat_cli.config.sections.data import DataConfig, TokenizerConfig
from nanochat_cli.config.sections.distill import INIT, DistillConfig
from nanochat_cli.config.sections.distributed import DistributedConfig
from nanochat_cli.config.sections.eval import EvalConfig
from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.config.sections.fire import FireConfig
from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.config.sections.loader import LoaderConfig
from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.config.sections.mtp import MTPConfig
from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.config.sections.run import CheckpointConfig, RunConfig, TelemetryConfig
from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.sections.train import TrainConfig


class Config(Section):
    """What `config.toml` of a run holds."""

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
    fim: FimConfig = Field(default_factory=FimConfig)
    distributed: DistributedConfig = Field(default_factory=DistributedConfig)
    fire: FireConfig = Field(default_factory=FireConfig)
    distill: DistillConfig = Field(default_factory=DistillConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    export: ExportConfig = Field(default_factory=ExportConfig)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.bigram_init.steps and self.model.tie_embeddings:
            raise ValueError(
                "bigram_init.steps needs model.tie_embeddings = false: one matrix cannot say which token comes first"
            )
        if self.bigram_init.steps and self.train.init is not None:
            raise ValueError(
                "bigram_init.steps begins from random weights and train.init from those of a model: set one of them"
            )
        if self.train.mix and self.data.base is None:
            raise ValueError("train.mix needs data.base, the data set of text that is mixed in")
        if self.collider.enabled and self.model.is_hybrid:
            raise ValueError(
                "collider.enabled needs model.deltanet off: its convolution and state mix tokens, and nothing defines "
                "what a filtered token leaves in them"
            )
        if self.collider.enabled and self.collider.scores is not None and (self.loader.on_the_fly or self.fim.rate):
            raise ValueError(
                "collider.scores belongs to the tokens of shards; it needs loader.on_the_fly = false and fim.rate = 0"
            )
        if self.train.four_bit and self.model.quant.enabled:
            self._require_four_bit()
        if self.distill.teacher == INIT and self.train.init is None:
            raise ValueError("distill.teacher = init needs train.init, the model that training begins with")
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len = {self.train.seq_len} is longer than model.max_seq_len = {self.model.max_seq_len}"
            )
        return self

    def _require_four_bit(self) -> None:
        """Raise ValueError for what contradicts activations in NVFP4."""
        train, quant = self.train, self.model.quant
        if not quant.activations:
            raise ValueError(f"train.forward = {train.forward} rounds activations; it needs model.quant.activations")
        if isinstance(quant.scale, int):
            raise ValueError(
                f"train.forward = {train.forward} multiplies by one scale per row; it needs model.quant.scale = row or "
                f"tensor, not {quant.scale}"
            )
        if quant.ramp:
            raise ValueError(f"model.quant.ramp mixes activations in int8; train.forward = {train.forward} needs it 0")
        if train.backward == "int8":
            raise ValueError(
                f"train.forward = {train.forward} has activations that int8 cannot hold; "
                "it needs train.backward = exact or bf16"
            )
