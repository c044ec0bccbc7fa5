"""SwiGLU feed-forward (arXiv:2002.05202) with ternary linears."""

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.model.bitlinear import BitLinear, Joint
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import QuantizedInput, swiglu_feed_forward


class FeedForward(nn.Module):
    """w_down(silu(w_gate x) · w_up x), x [..., C] before the norm where one is given; optional sub-norm before w_down.

    In training it is one operation. The forward pass is the same without it, and lets layers be measured one by one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.resolved_ffn_dim
        self.w_gate = BitLinear(config.dim, hidden, config.quant)
        self.w_up = BitLinear(config.dim, hidden, config.quant)
        self.w_down = BitLinear(hidden, config.dim, config.quant)
        self.sub_norm = RMSNorm(hidden, config.norm_eps) if config.sub_norm else None
        self.gate_up, self.down = Joint(self.w_gate, self.w_up), Joint(self.w_down)

    def forward(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        if self.training and torch.is_grad_enabled() and self.sub_norm is None:
            x, norm = x if norm is None else norm(x), None
            quantized = self.w_gate.quantize_input(x)
            if isinstance(quantized, QuantizedInput):
                layers, down = (self.w_gate, self.w_up, self.w_down), self.w_down
                latents, weights = [w.weight for w in layers], [w.quantized_weight() for w in layers]
                return swiglu_feed_forward(quantized, latents, weights, down.form, down.kept, down.backward)
        gate, up = self.gate_up.outputs(x, norm)
        return self.down.after_swiglu(gate, up, self.sub_norm)
