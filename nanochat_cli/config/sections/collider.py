"""`[collider]`: token filtering (Collider, arXiv:2502.00340). The forward pass sees every token."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, model_validator

from nanochat_cli.config.sections.section import Section


class ColliderConfig(Section):
    enabled: bool = Field(default=False, description="leave the least important tokens out of the backward pass")
    sparsity: float = Field(default=0.35, ge=0, lt=1, description="share of a micro-batch's tokens that is filtered")
    threshold: float = Field(
        default=1.0, gt=0, le=1, description="tokens whose importance, min-max-normalised, reaches this are kept"
    )
    score: Literal["ce", "excess", "entropy"] = Field(
        default="ce", description="importance: cross-entropy, cross-entropy over a reference model's, or entropy"
    )
    reference: Path | None = Field(default=None, description="run whose model gives the scores that `excess` subtracts")
    scores: Path | None = Field(default=None, description="file of `nanochat score` that gives these scores instead")
    warmup_steps: NonNegativeInt = Field(default=0, description="steps before filtering, at most a third of the run")

    @property
    def reference_in_use(self) -> Path | None:
        """The run whose model has to be loaded, if any."""
        used = self.enabled and self.score == "excess" and self.scores is None
        return self.reference if used else None

    def kept_share(self, total_steps: int) -> float:
        """Share of a run's tokens in the backward pass; 1, the most, where a threshold reads the data."""
        if not self.enabled or self.threshold < 1:
            return 1.0
        warm_up = min(self.warmup_steps / total_steps, 1 / 3)
        return 1 - (1 - warm_up) * self.sparsity

    @model_validator(mode="after")
    def _excess_needs_a_reference(self) -> Self:
        if self.enabled and self.score == "excess" and self.reference is None and self.scores is None:
            raise ValueError("score = excess needs reference (a run) or scores (a file of `nanochat score`)")
        return self
