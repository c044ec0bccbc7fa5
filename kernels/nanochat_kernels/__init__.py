"""Ternary (1.58-bit) kernels, usable without the application.

One reference per operation, in plain PyTorch, is the definition; every faster form is tested
against it. This package imports nothing of `nanochat_cli`.

Names:
    codes    ternary weights as int8 in {-1, 0, 1}, shape [N, K] (N outputs, K inputs)
    scale    what a code is multiplied by; always representable in float16
    effective weight = codes · scale: what a forward pass multiplies by
"""

import torch

from nanochat_kernels.attention import causal_attention
from nanochat_kernels.bit_linear import (
    Form,
    QuantizedInput,
    bit_linear,
    bit_linears,
    choose_form,
    quantize_input,
)
from nanochat_kernels.feedforward import swiglu_feed_forward
from nanochat_kernels.four_bit import FOUR_BIT
from nanochat_kernels.kept_rows import KeptRows, drop_filtered
from nanochat_kernels.linear_products import Backward, LinearWeight
from nanochat_kernels.operations import (
    fp8_matmul,
    int8_matmul,
    iterate_int8,
    packed_linear,
    quantize_activations,
    rmsnorm_quantize,
    swiglu_quantize,
    ternarize,
    ternarize_packed,
    ternarize_rows,
    ternary_matmul,
    unpack,
)
from nanochat_kernels.reference.activations import QuantizedActivations, fake_quantize_activations, mix_activations
from nanochat_kernels.reference.nvfp4 import nvfp4_ternary
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.packing import PLANE, pack_plane128, unpack_plane128
from nanochat_kernels.reference.ternarize import Granularity, Ternary, fake_ternarize

__all__ = [
    "FOUR_BIT",
    "PLANE",
    "Backward",
    "Form",
    "Granularity",
    "KeptRows",
    "LinearWeight",
    "PackedTernary",
    "QuantizedActivations",
    "QuantizedInput",
    "Ternary",
    "bit_linear",
    "bit_linears",
    "causal_attention",
    "choose_form",
    "drop_filtered",
    "fake_quantize_activations",
    "fake_ternarize",
    "fp8_matmul",
    "int8_matmul",
    "iterate_int8",
    "mix_activations",
    "nvfp4_ternary",
    "pack_plane128",
    "packed_linear",
    "quantize_activations",
    "quantize_input",
    "rmsnorm_quantize",
    "swiglu_feed_forward",
    "swiglu_quantize",
    "ternarize",
    "ternarize_packed",
    "ternarize_rows",
    "ternary_matmul",
    "unpack",
    "unpack_plane128",
]

# The first elementwise function that a process asks of oneMKL (2024.2, in torch's wheels) chooses the kernels of all of
# them, without a lock: of two threads that ask at once, one may compute with the least accurate kernel
# (pytorch#188792). So one thread asks, for one number, before any other can.
torch.ones(1, device="cpu").cos()
