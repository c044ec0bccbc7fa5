"""`[grpo]`: rollouts of problems, judged in a sandbox, and what is learned from them; see docs/methods/grpo.md."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from nanochat_cli.config.sections.section import Section


class GRPOConfig(Section):
    source: Path | None = Field(default=None, description="run to start from; `nanochat grpo RUN` sets it")
    task: str | None = Field(default=None, description="problems (--task): python, rust, a published set, or a file")
    mode: Literal["training-free", "policy", "rft"] = Field(
        default="training-free",
        description="show experiences, train the weights by GRPO, or fine-tune them on good answers (--mode)",
    )
    rounds: PositiveInt = Field(default=3, description="rounds of rollouts and learning (--rounds)")
    limit: PositiveInt | None = Field(default=None, description="use only the first so many problems; default: all")
    max_level: int | None = Field(
        default=None, ge=1, le=5, description="leave out problems above this level, and those without one"
    )
    held_out: float = Field(default=0.25, ge=0, lt=1, description="share of the problems that is never practised")
    problems: PositiveInt | None = Field(default=None, description="problems practised per round; default: all")
    group: int = Field(default=8, ge=2, description="rollouts of a problem, compared with each other (--group)")
    temperature: PositiveFloat = Field(
        default=0.8, description="of rollouts and evaluations; the objective divides logits by it too"
    )
    max_tokens: PositiveInt = Field(default=96, description="longest completion, in tokens")
    rewards: Path | None = Field(default=None, description="TOML file with the table [rewards]")
    standardise: bool = Field(default=False, description="divide advantages by the group's standard deviation")
    eval_samples: PositiveInt = Field(default=4, description="completions per problem before and after")
    workers: PositiveInt | None = Field(default=None, description="programs judged in parallel; default: one per core")

    library: Path | None = Field(default=None, description="file of experiences; default: experiences.jsonl in the run")
    threshold: NonNegativeFloat = Field(default=0.0, description="rollouts with a larger advantage become experiences")
    max_experiences: PositiveInt = Field(default=1000, description="size of the library; largest advantages are kept")
    shots: NonNegativeInt = Field(default=2, description="experiences shown before a prompt; 0: none")
    shot_temperature: PositiveFloat = Field(default=0.5, description="experiences are drawn ∝ exp(advantage / this)")
    lessons_url: str | None = Field(default=None, description="OpenAI-compatible endpoint for lessons (--lessons)")
    lessons_model: str = Field(default="default", description="name of the model at that endpoint")
    lessons_timeout: PositiveFloat = Field(default=60.0, description="seconds that an answer may take")
    max_lessons: PositiveInt = Field(default=16, description="lessons that are kept and shown")

    lr_factor: PositiveFloat = Field(default=0.1, description="factor on every learning rate of [optim]; no schedule")
    batch_size: PositiveInt = Field(default=16, description="completions per optimizer step")
    updates: PositiveInt = Field(default=8, description="most optimizer steps per round")
    epochs: PositiveInt = Field(default=1, description="most passes over the completions of a round")
    max_divergence: PositiveFloat = Field(
        default=0.1, description="nats per token from the policy that drew; beyond it new rollouts are drawn"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="ratios below 1 − this are not pushed further down")
    clip_high: PositiveFloat = Field(default=0.2, description="ratios above 1 + this are not pushed further up")
    ratio_cap: float = Field(default=3.0, gt=1, description="ratios above this have no gradient at all")
    kl_weight: NonNegativeFloat = Field(
        default=0.0, description="weight of the KL divergence from the initial model, which checkpoints then hold"
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        default="token", description="mean over tokens, over means of sequences, or over a constant length"
    )
    min_reward: float = Field(default=0.5, ge=0, le=1, description="rft: least reward of a good answer")

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.ratio_cap < 1 + self.clip_high:
            raise ValueError(f"grpo.ratio_cap = {self.ratio_cap} must be 1 + grpo.clip_high or more")
        if self.lessons_url is None:
            return self
        if self.mode != "training-free":
            raise ValueError(f"grpo.lessons_url needs grpo.mode = training-free, not {self.mode}")
        if not self.lessons_url.startswith(("http://", "https://")):
            raise ValueError(f"grpo.lessons_url = {self.lessons_url} must start with http:// or https://")
        return self
