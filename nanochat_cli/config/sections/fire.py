"""`[fire]`: reinitialisation of matrices to their nearest isometry (FIRE, arXiv:2602.08040)."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nanochat_cli.config.sections.section import Section


class FireConfig(Section):
    enabled: bool = Field(default=False, description="reinitialise matrices to their nearest isometry")
    steps: list[PositiveInt] = Field(
        default=[], description="steps after which it happens, whatever the trigger; also the step of a resume"
    )
    trigger: Literal["steps", "phase", "dormant", "isometry"] = Field(
        default="steps",
        description="steps: the listed ones only; phase: also when a run is resumed on other data; dormant, isometry: "
        "also when a measurement says so",
    )
    interval: PositiveInt = Field(default=500, description="steps between the measurements of these triggers")
    dormant_fraction: float = Field(
        default=0.3, gt=0, le=1, description="share of dormant feed-forward units that triggers (arXiv:2302.12902)"
    )
    dormant_threshold: NonNegativeFloat = Field(
        default=0.025,
        description="a unit is dormant if its mean absolute activity is at most this multiple of its layer's mean",
    )
    isometry_deviation: PositiveFloat = Field(
        default=2.0, description="mean deviation that triggers, over that of random matrices of the same shapes"
    )
    method: Literal["newton-schulz", "polar-express"] = Field(
        default="newton-schulz", description="polynomials of the iteration (polar-express: arXiv:2505.16932)"
    )
    target: PositiveFloat = Field(default=1e-6, description="deviation from isometry at which the iteration stops")
    max_iterations: PositiveInt = Field(default=60, description="most iterations")
    scale: Literal["paper", "preserve_norm", "fan_in"] = Field(
        default="preserve_norm", description="scale of the isometry: sqrt(out / in), the old norm, or 1 / sqrt(in)"
    )
    layers: list[str] = Field(
        default=["*"], min_length=1, description="names of linear layers of the blocks; wildcards allowed"
    )
    rewarm_steps: NonNegativeInt = Field(
        default=50, description="steps over which the learning rate climbs back, at most half of those left"
    )

    @model_validator(mode="after")
    def _something_triggers(self) -> Self:
        if self.enabled and self.trigger == "steps" and not self.steps:
            raise ValueError("fire.enabled = true with fire.trigger = steps needs fire.steps, such as [1000]")
        return self
