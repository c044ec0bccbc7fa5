"""BitLinear: a linear layer with ternary weights and int8 activations (arXiv:2402.17764), no bias.

Holds the latent float32 weight, which the optimizer trains, and the effective weight codes · scale,
which the forward pass uses. `requantize` derives the second from the first; the trainer calls it once
after every optimizer step. The quantizers themselves live in `nanochat_kernels`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nanochat_cli.config.schema import QuantConfig
from nanochat_kernels import Ternary, fake_quantize_activations, fake_ternarize, ternarize, ternary_linear

ActivationQuantizer = Callable[[Tensor], Tensor]


class BitLinear(nn.Module):
    """y = Q(x) · effectiveᵀ. With `quant.enabled = false` it is a plain float linear and holds nothing else."""

    effective: Tensor

    def __init__(self, in_features: int, out_features: int, quant: QuantConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quant = quant
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.activation_quantizer: ActivationQuantizer = fake_quantize_activations
        self._loaded: Ternary | None = None
        if quant.enabled:
            self.register_buffer("effective", torch.empty(out_features, in_features), persistent=False)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Fake-quantised x, to be shared by all layers that read the same input."""
        if self.quant.enabled and self.quant.activations:
            return self.activation_quantizer(x)
        return x

    def project(self, quantized: Tensor) -> Tensor:
        """The matrix product alone. quantized: [..., in], from `quantize_input`. Returns [..., out]."""
        if self.quant.enabled:
            return ternary_linear(quantized, self.weight, self.effective)
        return nn.functional.linear(quantized, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.quantize_input(x))

    def ternary(self) -> Ternary:
        """Codes and scales of this layer as it computes now. RuntimeError for a float layer."""
        if not self.quant.enabled:
            raise RuntimeError("a float linear has no ternary codes")
        return self._loaded or ternarize(self.weight, self.quant.scale)

    @torch.no_grad()
    def requantize(self) -> None:
        """Refresh the effective weight from the latent; in place, so that compiled code keeps its pointer."""
        if self.quant.enabled and self._loaded is None:
            self.effective.copy_(fake_ternarize(self.weight, self.quant.scale))

    @torch.no_grad()
    def set_ternary(self, ternary: Ternary) -> None:
        """Use exactly these codes and scales (read from a file) from now on; the latent becomes their product."""
        self.effective.copy_(ternary.dequantize())
        self.weight.copy_(self.effective)
        self._loaded = ternary
