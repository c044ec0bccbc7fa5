"""`[export]`: the GGUF file."""

from typing import Literal

from pydantic import Field

from nanochat_cli.config.sections.section import Section


class ExportConfig(Section):
    type: Literal["auto", "tq2_0", "tq1_0", "q2_0", "q4_0", "f16", "f32"] = Field(
        default="auto", description="type of the ternary matrices (--type)"
    )
    head: Literal["f16", "f32"] = Field(default="f16", description="type of embedding and head (--head)")
    verify: bool = Field(default=True, description="read the file back and compare; --no-verify turns it off")
    paths: bool = Field(
        default=False, description="record whole paths in the file's `nanochat.config`, not only the name of each"
    )
