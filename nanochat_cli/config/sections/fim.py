"""`[fim]`: fill-in-the-middle, rows of training in which a model sees what comes after the text that it is to write."""

from pydantic import Field

from nanochat_cli.config.sections.section import Section


class FimConfig(Section):
    rate: float = Field(default=0.0, ge=0, le=1, description="share of the fragments whose middle comes last; 0: off")
    spm_rate: float = Field(
        default=0.5, ge=0, le=1, description="share of those with the suffix first, as llama.cpp's --spm-infill asks"
    )

    @property
    def suffix_first(self) -> bool:
        """Whether a model trained so is asked with the suffix first, which keeps the prefix next to the gap."""
        return self.rate > 0 and self.spm_rate > 0

    def held(self) -> dict[str, object]:
        return {"rate": self.rate, "spm_rate": self.spm_rate} if self.rate else {}
