"""The Triton backend: the operations of the reference, with their names and signatures.

Raises Unsupported, with the reason, for tensors that are not on CUDA (outside the interpreter) and for what no kernel
takes. Never waits for the device, so code 3 in packed weights is not checked here: `PackedTernary.from_bytes`, which
takes packed bytes from elsewhere, checks it once.
"""

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.gradient import QuantizedGradient
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.reference.ternarize import Granularity, Ternary
from nanochat_kernels.triton_kernels.configurations import GEMV_TOKENS, PACKED_TOKENS
from nanochat_kernels.triton_kernels.cross_entropy import cross_entropy_gradient
from nanochat_kernels.triton_kernels.gemv import ternary_gemv
from nanochat_kernels.triton_kernels.int8_gradients import int8_gradients
from nanochat_kernels.triton_kernels.int8_matmul import fp8_matmul as _fp8_matmul
from nanochat_kernels.triton_kernels.int8_matmul import int8_matmul as _int8_matmul
from nanochat_kernels.triton_kernels.int8_matmul import scaled_matmul
from nanochat_kernels.triton_kernels.nvfp4 import nvfp4_matmul, nvfp4_quantize
from nanochat_kernels.triton_kernels.quantize import quantize
from nanochat_kernels.triton_kernels.quantize_gradient import quantize_gradient as _quantize_gradient
from nanochat_kernels.triton_kernels.small_matmul import ternary_small_matmul
from nanochat_kernels.triton_kernels.ternarize import ternarize_forms, ternarize_rows
from nanochat_kernels.triton_kernels.unpack import unpack as _unpack
from nanochat_kernels.triton_kernels.unpack import unpack_effective

__all__ = [
    "cross_entropy_gradient",
    "fp8_matmul",
    "int8_gradients",
    "int8_matmul",
    "nvfp4_matmul",
    "nvfp4_quantize",
    "packed_linear",
    "quantize_activations",
    "quantize_gradient",
    "rmsnorm_quantize",
    "swiglu_quantize",
    "ternarize",
    "ternarize_packed",
    "ternarize_rows",
    "ternary_matmul",
    "unpack",
]


def ternarize(weight: Tensor, granularity: Granularity = "row") -> Ternary:
    """`reference.ternarize.ternarize` in one kernel (two with groups, three for one scale of the tensor)."""
    forms = ternarize_forms(weight, granularity)
    return Ternary(_present(forms.codes), forms.scales, granularity)


def ternarize_packed(weight: Tensor, granularity: Granularity = "row") -> PackedTernary:
    """Codes and scales of a latent weight, packed without the int8 codes in between."""
    forms = ternarize_forms(weight, granularity, codes=False, packed=True)
    scales = forms.scales.expand(weight.shape[0], -1).contiguous()
    return PackedTernary(_present(forms.packed), scales, weight.shape[1])


def quantize_activations(x: Tensor, group: int | None = None) -> QuantizedActivations:
    return quantize(x, group=group)


def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, group: int | None = None) -> QuantizedActivations:
    return quantize(x, weight, form="rmsnorm", eps=eps, group=group)


def swiglu_quantize(gate: Tensor, up: Tensor, group: int | None = None) -> QuantizedActivations:
    return quantize(gate, up, form="swiglu", group=group)


def quantize_gradient(dy: Tensor, factor: Tensor, weight: Tensor, levels: float) -> QuantizedGradient:
    """`reference.gradient.quantize_gradient`; the codes by column are a view of their transpose."""
    codes, scale, columns, column_scale = _quantize_gradient(dy, factor, weight, levels)
    return QuantizedGradient(codes, scale, columns[:, : len(codes)].T, column_scale)


def int8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    return _int8_matmul(a, b, a_scale, b_scale, out_dtype)


def fp8_matmul(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    return _fp8_matmul(a, b, a_scale, b_scale, out_dtype)


def ternary_matmul(
    activations: QuantizedActivations, weight: PackedTernary, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Up to 4 tokens: dp4a. Up to 64: tensor cores on packed weights. More: unpacked once, then an ordinary product.

    The unpacked form is int8 with one scale per row, and float16 codes · scale with groups.
    """
    codes, scale, _ = activations
    tokens = codes.numel() // weight.columns
    if tokens <= GEMV_TOKENS:
        return ternary_gemv(activations, weight, out_dtype)
    if tokens <= PACKED_TOKENS:
        return ternary_small_matmul(activations, weight, out_dtype)
    rows, a_scale = codes.reshape(-1, weight.columns), scale.reshape(-1, 1)
    if weight.n_groups == 1:
        y = _int8_matmul(rows, _unpack(weight), a_scale, weight.scales, out_dtype)
    else:
        one = torch.ones(1, device=codes.device)
        effective = unpack_effective(weight)
        y = scaled_matmul(rows.to(torch.float16), effective, a_scale, one, out_dtype, torch.float16)
    return y.reshape(*codes.shape[:-1], weight.rows)


def packed_linear(x: Tensor, weight: PackedTernary, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """`ternary_matmul` of `quantize_activations(x)`: float [..., K] to [..., N]."""
    return ternary_matmul(quantize_activations(x, weight.group), weight, out_dtype)


def unpack(weight: PackedTernary, dtype: torch.dtype = torch.int8) -> Tensor:
    return _unpack(weight, dtype)


def _present(form: Tensor | None) -> Tensor:
    if form is None:
        raise Unsupported("a form that was not requested")
    return form
