"""`[mtp]`: multi-token prediction, an auxiliary loss on tokens further ahead (arXiv:2404.19737, 2412.19437)."""

from typing import Literal

from pydantic import Field, NonNegativeFloat

from nanochat_cli.config.sections.section import Section


class MTPConfig(Section):
    enabled: bool = Field(default=False, description="also train on tokens beyond the next one")
    kind: Literal["heads", "shared", "nextn"] = Field(
        default="heads",
        description="heads: a small one per token; shared: the model's own logits; nextn: one more block",
    )
    n_tokens: int = Field(default=3, ge=1, le=4, description="tokens beyond the next one (nextn: always 1)")
    weight: NonNegativeFloat = Field(default=0.2, description="weight of all auxiliary losses together")
    decay: float = Field(default=0.5, gt=0, le=1, description="weight of a token over that of the one before")
    every: int = Field(default=1, ge=1, description="its losses cover one position in so many, others in the next step")
    fade: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the run by which its weight has fallen to 0 (shared: by default 1)",
    )

    def held(self) -> dict[str, object]:
        if not self.enabled:
            return {"enabled": False}
        return {"enabled": True, "kind": self.kind, "n_tokens": 1 if self.kind == "nextn" else self.n_tokens}
