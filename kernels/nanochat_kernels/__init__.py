"""Ternary (1.58-bit) kernels, usable without the application.

One reference per operation, in plain PyTorch, is the definition; every faster form is tested
against it. This package imports nothing of `nanochat_cli`.

Names:
    codes    ternary weights as int8 in {-1, 0, 1}, shape [N, K] (N outputs, K inputs)
    scale    what a code is multiplied by; always representable in float16
    effective weight = codes · scale: what a forward pass multiplies with
"""

from nanochat_kernels.reference.activations import fake_quantize_activations, quantize_activations
from nanochat_kernels.reference.linear import ternary_linear
from nanochat_kernels.reference.packing import pack_plane128, unpack_plane128
from nanochat_kernels.reference.ternarize import Granularity, Ternary, fake_ternarize, ternarize

__all__ = [
    "Granularity",
    "Ternary",
    "fake_quantize_activations",
    "fake_ternarize",
    "pack_plane128",
    "quantize_activations",
    "ternarize",
    "ternary_linear",
    "unpack_plane128",
]
