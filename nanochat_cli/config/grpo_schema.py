"""The section `[grpo]`: learning from rewards. The argument of `rl.run_grpo`; weights of the reward are a file's."""

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nanochat_cli.config.section import Section


class GRPOConfig(Section):
    """Rollouts of problems, judged in a sandbox, and what is learned from them; see docs/methods/grpo.md."""

    source: Path | None = Field(default=None, description="the run that it starts from; nanochat grpo names it")
    task: str | None = Field(default=None, description="problems: python, rust, a published set, or a file")
    mode: Literal["training-free", "policy", "rft"] = Field(
        default="training-free", description="show experiences, GRPO on the weights, or fine-tune on good answers"
    )
    rounds: PositiveInt = 3
    limit: PositiveInt | None = Field(default=None, description="use this many problems; default: all")
    max_level: int | None = Field(default=None, ge=1, le=5, description="leave out problems above this level")
    held_out: float = Field(default=0.25, ge=0, lt=1, description="share of the problems that is never practised")
    problems: PositiveInt | None = Field(default=None, description="practised in a round; default: all")
    group: int = Field(default=8, ge=2, description="rollouts of a problem that are compared with each other")
    temperature: PositiveFloat = 0.8
    max_tokens: PositiveInt = Field(default=96, description="of a completion at most")
    rewards: Path | None = Field(default=None, description="TOML file with the table [rewards]")
    standardise: bool = Field(default=False, description="divide advantages by the group's standard deviation")
    eval_samples: PositiveInt = Field(default=4, description="completions of a problem before and after")
    workers: PositiveInt | None = Field(default=None, description="programs judged at a time; default: one per core")

    library: Path | None = Field(default=None, description="file of experiences; default: experiences.jsonl in the run")
    threshold: NonNegativeFloat = Field(default=0.0, description="an experience has an advantage above it")
    max_experiences: PositiveInt = Field(default=1000, description="more are dropped, the smallest advantages first")
    shots: NonNegativeInt = Field(default=2, description="experiences shown before a prompt; 0: none")
    shot_temperature: PositiveFloat = Field(default=0.5, description="they are drawn ∝ exp(advantage / this)")
    lessons_url: str | None = Field(default=None, description="OpenAI-compatible endpoint that writes lessons")
    lessons_model: str = Field(default="default", description="name of the model there")
    lessons_timeout: PositiveFloat = Field(default=60.0, description="seconds for one answer")
    max_lessons: PositiveInt = Field(default=16, description="kept and shown at a time")

    lr_factor: PositiveFloat = Field(default=0.1, description="on every learning rate of [optim]; no schedule")
    batch_size: PositiveInt = Field(default=16, description="completions of an optimizer step")
    updates: PositiveInt = Field(default=8, description="optimizer steps of a round at most")
    epochs: PositiveInt = Field(default=1, description="passes over the completions of a round at most")
    max_divergence: PositiveFloat = Field(
        default=0.1, description="nats per token from the policy that drew; beyond it new rollouts are drawn"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: PositiveFloat = 0.2
    ratio_cap: float = Field(default=3.0, gt=1)
    kl_weight: NonNegativeFloat = Field(default=0.0, description="of the distance to the model it started from")
    aggregation: Literal["token", "sequence", "constant"] = Field(default="token", description="mean over what")
    min_reward: float = Field(default=0.5, ge=0, le=1, description="rft: a good answer has this reward or more")

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "GRPOConfig":
        if self.ratio_cap < 1 + self.clip_high:
            raise ValueError(f"grpo.ratio_cap = {self.ratio_cap} must be 1 + grpo.clip_high or more")
        if self.lessons_url is None:
            return self
        if self.mode != "training-free":
            raise ValueError(f"grpo.lessons_url needs grpo.mode = training-free, not {self.mode}")
        if not self.lessons_url.startswith(("http://", "https://")):
            raise ValueError(f"grpo.lessons_url = {self.lessons_url} must start with http:// or https://")
        return self
