"""`[eval]`: scoring held-out tokens during training and at its end."""

from pydantic import Field, PositiveInt

from nanochat_cli.config.sections.section import Section


class EvalConfig(Section):
    interval: PositiveInt = Field(default=250, description="steps between evaluations")
    max_tokens: PositiveInt = Field(default=262_144, description="held-out tokens that a periodic evaluation reads")
    final_max_tokens: PositiveInt | None = Field(
        default=None, description="held-out tokens that the final evaluation reads; default: all"
    )
    batch_size: PositiveInt = Field(default=16, description="sequences that are scored at once")
