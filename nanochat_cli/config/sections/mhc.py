"""`[model.mhc]`: manifold-constrained hyper-connections in the form mHC-lite (arXiv:2512.24880, 2601.05732)."""

from math import factorial
from typing import Literal

from pydantic import Field, PositiveFloat

from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.size import ParameterCounts


class MHCConfig(Section):
    streams: Literal[1, 2, 4] = Field(default=1, description="residual streams; 1: the plain residual")
    dynamic: bool = Field(default=True, description="the mixing depends on the token; false: it is the same for all")
    init: Literal["identity", "balanced", "high-entropy", "layer-dependent"] = Field(
        default="identity", description="initial mixing of the streams"
    )
    gate_init: PositiveFloat = Field(default=0.01, description="initial gate of the token-dependent terms")

    def count_parameters(self, dim: int) -> ParameterCounts:
        """Parameters of the mixing around one sublayer; none for the plain residual."""
        if self.streams == 1:
            return ParameterCounts()
        outputs = 2 * self.streams + factorial(self.streams)
        dynamic = outputs * self.streams * dim + 3 if self.dynamic else 0
        return ParameterCounts(hyper_connections=outputs + dynamic)
