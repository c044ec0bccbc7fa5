"""`[distributed]`: how several processes train one model."""

from typing import Literal

from pydantic import Field, PositiveInt

from nanochat_cli.config.sections.section import Section


class DistributedConfig(Section):
    mode: Literal["auto", "owned", "fsdp"] = Field(
        default="auto",
        description="owned: each weight has one owner, and any number of ranks computes the same bits; fsdp: so too, "
        "and a rank keeps codes and gradients of some rows of each matrix only; auto: owned from two ranks on",
    )
    timeout: PositiveInt = Field(default=600, description="seconds of silence after which the other ranks are given up")
