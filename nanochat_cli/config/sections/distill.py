"""`[distill]`: a second loss, the distance from the predictions of a teacher (arXiv:1503.02531)."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveFloat

from nanochat_cli.config.sections.section import Section

INIT = Path("init")
"""As a teacher: the run whose weights training begins with."""


class DistillConfig(Section):
    teacher: Path | None = Field(
        default=None, description="run whose predictions are learned; init: the one of train.init"
    )
    weight: float = Field(default=0.5, ge=0, le=1, description="of the distance from the teacher; the rest: the loss")
    temperature: PositiveFloat = Field(default=1.0, description="what the logits of both are divided by")
    top_k: NonNegativeInt = Field(
        default=0, description="only the teacher's so many most probable tokens, renormalised; 0: all"
    )
