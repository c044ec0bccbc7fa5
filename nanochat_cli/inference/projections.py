"""The linear layers of a packed model: one operation each, with what comes before it fused into the quantisation.

`PackedProjection` multiplies packed ternary weights; `DenseProjection` stands in where they cannot be had or would be
slower. Both hold one or several matrices under each other that read the same input.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import PackedTernary, packed_linear, rmsnorm_quantize, swiglu_quantize, ternary_matmul
from nanochat_kernels.backends import Backend, report_fallback
from nanochat_kernels.reference.activations import codes_and_scale
from nanochat_kernels.reference.packing import PLANE


class Projection(Protocol):
    """[..., K] to [..., N] in the dtype of the input."""

    @property
    def bytes(self) -> int: ...
    def __call__(self, x: Tensor) -> Tensor: ...
    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor: ...
    def after_swiglu(self, gate: Tensor, up: Tensor) -> Tensor: ...


class PackedProjection:
    """int8 activations times packed weights. fused: norm and gate by the backend's own kernel, not by torch."""

    def __init__(self, layers: Sequence[BitLinear], backend: str | None, fused: bool, device: torch.device) -> None:
        self.weight = PackedTernary.concatenate([_packed(layer) for layer in layers]).to(device)
        self.backend, self.fused = backend, fused

    @property
    def bytes(self) -> int:
        return self.weight.bytes

    def __call__(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, x.dtype, backend=self.backend)

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        if not self.fused:
            return self(norm(x))
        quantized = rmsnorm_quantize(x, norm.weight, norm.eps, self.weight.group, backend=self.backend)
        return ternary_matmul(quantized, self.weight, x.dtype, backend=self.backend)

    def after_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if not self.fused:
            return self(swiglu(gate, up))
        quantized = swiglu_quantize(gate, up, self.weight.group, backend=self.backend)
        return ternary_matmul(quantized, self.weight, gate.dtype, backend=self.backend)


class DenseProjection:
    """Float weights; with quantised activations where the layers have them. Computes what training computes."""

    def __init__(self, layers: Sequence[BitLinear], device: torch.device, dtype: torch.dtype) -> None:
        self.quantized = layers[0].quant.enabled and layers[0].quant.activations
        weights, scales = zip(*(_operand(layer) for layer in layers), strict=True)
        self.weight = torch.cat(weights).to(device, dtype)
        self.scale = torch.cat(scales).to(device)

    @property
    def bytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return nn.functional.linear(x, self.weight) * self.scale.to(x.dtype)
        codes, scale = codes_and_scale(x)
        return (nn.functional.linear(codes.to(self.weight.dtype), self.weight) * scale * self.scale).to(x.dtype)

    def after_norm(self, x: Tensor, norm: RMSNorm) -> Tensor:
        return self(norm(x))

    def after_swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        return self(swiglu(gate, up))


class Pack:
    """Makes the projection for layers that read the same input; says once why some are not packed."""

    def __init__(self, backend: Backend | None, fused: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.backend, self.fused, self.device, self.dtype = backend, fused, device, dtype

    def __call__(self, *layers: BitLinear) -> Projection:
        reason = self._obstacle(layers[0])
        if reason is None:
            return PackedProjection(layers, self.backend, self.fused, self.device)
        if layers[0].quant.enabled and self.backend is not None:
            report_fallback("packed layers", self.backend, reason)
        return DenseProjection(layers, self.device, self.dtype)

    def _obstacle(self, layer: BitLinear) -> str | None:
        if not layer.quant.enabled:
            return "the model is not ternary"
        if not layer.quant.activations:
            return "the model does not quantise activations"
        if layer.in_features % PLANE:
            return f"{layer.in_features} inputs are not a multiple of {PLANE}"
        if self.backend is None:
            return "no backend computes packed weights here"
        return None


def _packed(layer: BitLinear) -> PackedTernary:
    weight = PackedTernary.pack(layer.ternary())
    return weight if layer.gain == 1 else PackedTernary(weight.packed, weight.scales * layer.gain, weight.columns)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def _operand(layer: BitLinear) -> tuple[Tensor, Tensor]:
    """What a float product multiplies with, [N, K], and the scale [N] of its rows afterwards.

    With one scale per row the operand is the codes, whose products with int8 are exact; groups are multiplied out.
    """
    gain = torch.full((layer.out_features,), layer.gain, device=layer.weight.device)
    if not layer.quant.enabled:
        return layer.weight.detach(), gain
    ternary = layer.ternary()
    if ternary.scales.shape[1] > 1:
        return ternary.dequantize(), gain
    return ternary.codes.float(), ternary.scales.reshape(-1) * gain
