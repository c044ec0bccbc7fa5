"""`[model.deltanet]`: layers of gated DeltaNet in place of attention, in the form of Qwen3.5 (arXiv:2412.06464)."""

from typing import Literal

from pydantic import Field, PositiveInt

from nanochat_cli.config.sections.section import Section
from nanochat_cli.config.size import ParameterCounts


class DeltaNetConfig(Section):
    ratio: float = Field(default=0.0, ge=0, le=1, description="share of layers that are DeltaNet, spread evenly")
    pattern: str | None = Field(
        default=None,
        pattern="^[DA]+$",
        description="instead of ratio: D (DeltaNet) and A (attention), such as DDDA, repeated over the layers",
    )
    n_heads: PositiveInt | None = Field(default=None, description="heads of a DeltaNet layer; default: model.n_heads")
    head_dim: PositiveInt | None = Field(default=None, description="width of a head; default: that of attention")
    conv_kernel: int = Field(default=4, ge=2, le=8, description="tokens that the causal convolution spans")
    chunk: PositiveInt = Field(default=64, description="tokens that training computes as one chunk")
    backend: Literal["auto", "torch", "fla"] = Field(
        default="auto", description="auto: flash-linear-attention (fla) on CUDA if it is installed"
    )

    def count_parameters(self, dim: int, n_heads: int, head_dim: int) -> ParameterCounts:
        """Parameters of one layer of this shape."""
        inner = n_heads * head_dim
        other = 2 * dim * n_heads + 3 * inner * self.conv_kernel + 2 * n_heads
        return ParameterCounts(deltanet=5 * dim * inner, other=other, norms=head_dim)
