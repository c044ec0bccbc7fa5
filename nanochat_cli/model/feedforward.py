"""SwiGLU feed-forward (arXiv:2002.05202) with ternary linears."""

from torch import Tensor, nn

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.norm import RMSNorm


class FeedForward(nn.Module):
    """w_down(silu(w_gate x) · w_up x), x [B, T, C]; optional sub-norm before w_down."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.resolved_ffn_dim
        self.w_gate = BitLinear(config.dim, hidden, config.quant)
        self.w_up = BitLinear(config.dim, hidden, config.quant)
        self.w_down = BitLinear(hidden, config.dim, config.quant)
        self.sub_norm = RMSNorm(hidden, config.norm_eps) if config.sub_norm else None

    def forward(self, x: Tensor) -> Tensor:
        quantized = self.w_gate.quantize_input(x)
        hidden = nn.functional.silu(self.w_gate.project(quantized)) * self.w_up.project(quantized)
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        return self.w_down(hidden)
