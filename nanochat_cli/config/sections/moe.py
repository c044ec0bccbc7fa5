"""`[model.moe]`: mixture of experts in the form of Mixtral (arXiv:2401.04088)."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.size import ParameterCounts


class MoEConfig(Section):
    enabled: bool = Field(default=False, description="every feed-forward is a mixture of experts")
    experts: int = Field(default=8, ge=2, description="experts per layer, each of width model.ffn_dim")
    active: PositiveInt = Field(default=2, description="experts that a token is routed to")
    balance: Literal["loss", "bias", "none"] = Field(
        default="loss", description="loss: an auxiliary loss; bias: a selection bias instead (arXiv:2408.15664)"
    )
    loss_weight: NonNegativeFloat = Field(default=0.01, description="weight of the auxiliary loss (arXiv:2101.03961)")
    bias_rate: PositiveFloat = Field(default=1e-3, description="change of the selection bias per step")
    capacity_factor: NonNegativeFloat = Field(
        default=0.0, description="most assignments per expert in training, relative to an even load; 0: no limit"
    )
    shared: bool = Field(default=False, description="one more expert, which every token goes through")

    def count_parameters(self, dim: int, expert: int) -> ParameterCounts:
        """Parameters of one mixture of experts with `expert` parameters each."""
        return ParameterCounts(
            feed_forward=(self.experts + self.shared) * expert,
            router=dim * self.experts,
            inactive=(self.experts - self.active) * expert,
        )
