"""SwiGLU feed-forward (arXiv:2002.05202) with ternary linears."""

import torch
from torch import Tensor, nn

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.bitlinear import BitLinear, project_all
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import QuantizedInput, swiglu_feed_forward


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
        if isinstance(quantized, QuantizedInput) and self._is_one_operation:
            layers = self.w_gate, self.w_up, self.w_down
            latents, weights = [w.weight for w in layers], [w.quantized_weight() for w in layers]
            down = self.w_down
            return swiglu_feed_forward(quantized, latents, weights, down.form, down.kept, down.grad_input)
        gate, up = project_all((self.w_gate, self.w_up), quantized)
        hidden = nn.functional.silu(gate) * up
        if self.sub_norm is not None:
            hidden = self.sub_norm(hidden)
        return self.w_down(hidden)

    @property
    def _is_one_operation(self) -> bool:
        """In training: the forward pass is the same without it, and layers may be measured one by one."""
        return self.training and torch.is_grad_enabled() and self.sub_norm is None
