"""Packing: a copy of a model whose operations are exchanged for those that run fast, for inference only.

Layers that read one input become one product, of two bits a weight, with the norm or the gate before it fused into the
quantisation. What is no operation (norms, gates, routers, the mixing of streams) computes as it does in training.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

from nanochat_cli.model.bitlinear import BitLinear, Joint
from nanochat_cli.model.feedforward import FeedForward
from nanochat_cli.model.moe import ExpertLinear, Experts, Routing
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import PLANE, PackedTernary, packed_linear, rmsnorm_quantize, swiglu_quantize, ternary_matmul
from nanochat_kernels.backends import Backend, report_fallback
from nanochat_kernels.reference.activations import codes_and_scale

_Module = TypeVar("_Module", bound=nn.Module)


class Projection(Joint, ABC):
    """A `Joint` that multiplies with one matrix, the rows of its layers under each other."""

    bytes: int
    """Memory of the weights."""

    def __init__(self, layers: Sequence[BitLinear]) -> None:
        self.widths = [layer.out_features for layer in layers]

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N], N of all layers, in the dtype of x."""

    def output(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        return self.product(x if norm is None else norm(x))

    def outputs(self, x: Tensor, norm: RMSNorm | None = None) -> Sequence[Tensor]:
        return self.output(x, norm).split(self.widths, dim=-1)


class DenseProjection(Projection):
    """Float weights, where packed ones cannot be had or would be slower; activations quantised where training does."""

    def __init__(self, layers: Sequence[BitLinear], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(layers)
        self.quantized = layers[0].quant.enabled and layers[0].quant.activations
        weights, scales = zip(*(_operand(layer) for layer in layers), strict=True)
        self.weight = torch.cat(weights).to(device, dtype)
        self.scale = torch.cat(scales).to(device)
        self.bytes = self.weight.numel() * self.weight.element_size()

    def product(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return nn.functional.linear(x, self.weight) * self.scale.to(x.dtype)
        codes, scale = codes_and_scale(x)
        return (nn.functional.linear(codes.to(self.weight.dtype), self.weight) * scale * self.scale).to(x.dtype)


class PackedProjection(Projection):
    """int8 activations times packed weights; norm and gate by torch."""

    def __init__(self, layers: Sequence[BitLinear], device: torch.device, backend: str) -> None:
        super().__init__(layers)
        self.weight = PackedTernary.concatenate([_packed(layer) for layer in layers]).to(device)
        self.backend, self.bytes = backend, self.weight.bytes

    def product(self, x: Tensor) -> Tensor:
        return packed_linear(x, self.weight, x.dtype, backend=self.backend)


class FusedProjection(PackedProjection):
    """Norm and gate by the backend's own kernel."""

    def output(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        if norm is None:
            return self.product(x)
        quantized = rmsnorm_quantize(x, norm.weight, norm.eps, self.weight.group, backend=self.backend)
        return ternary_matmul(quantized, self.weight, x.dtype, backend=self.backend)

    def after_swiglu(self, gate: Tensor, up: Tensor, norm: RMSNorm | None = None) -> Tensor:
        if norm is not None:
            return super().after_swiglu(gate, up, norm)
        quantized = swiglu_quantize(gate, up, self.weight.group, backend=self.backend)
        return ternary_matmul(quantized, self.weight, gate.dtype, backend=self.backend)


class PackedExperts(Experts):
    """The chosen experts one after the other, each on its own tokens. experts: gate and up, and down, of each."""

    def __init__(self, experts: Sequence[tuple[Projection, Projection]]) -> None:
        self.experts = experts

    def output(self, x: Tensor, routing: Routing, shared: FeedForward | None) -> Tensor:
        ends = [0, *routing.counts.cumsum(0).tolist()]
        out = torch.zeros_like(x) if shared is None else shared(x)
        for (gate_up, down), (start, end) in zip(self.experts, pairwise(ends), strict=True):
            if start < end:
                tokens = routing.tokens[start:end]
                gate, up = gate_up.outputs(x[tokens])
                y = down.after_swiglu(gate, up)
                out.index_add_(0, tokens, (y.float() * routing.weights[start:end, None]).to(out.dtype))
        return out


class Packer:
    """Packs modules that are written in operations; says once why layers are not packed.

    backend: of the packed products; None: float ones. fused: norms and gates by the backend. dtype: of float weights.
    """

    def __init__(self, backend: Backend | None, fused: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.backend, self.fused, self.device, self.dtype = backend, fused, device, dtype
        self.projections: list[Projection] = []
        """All that were made."""

    def pack(self, module: _Module) -> _Module:
        """A copy in evaluation mode that holds no linear layer and shares all other parameters with the module."""
        layers = [layer for layer in module.modules() if isinstance(layer, BitLinear)]
        packed = copy.deepcopy(module, {id(one): one for one in (*module.parameters(), *module.buffers(), *layers)})
        for part in list(packed.modules()):
            for name, operation in list(vars(part).items()):
                if isinstance(operation, Joint):
                    setattr(part, name, self._projection(*operation.layers))
                elif isinstance(operation, Experts):
                    setattr(part, name, self._experts(*operation.layers))
            for name, child in list(part.named_children()):
                if isinstance(child, BitLinear):
                    delattr(part, name)
        return packed.eval()

    def _experts(self, gate: ExpertLinear, up: ExpertLinear, down: ExpertLinear) -> PackedExperts:
        parts = ((gate.expert(i), up.expert(i), down.expert(i)) for i in range(gate.experts))
        return PackedExperts([(self._projection(*gate_up), self._projection(down)) for *gate_up, down in parts])

    def _projection(self, *layers: BitLinear) -> Projection:
        quant, inputs = layers[0].quant, layers[0].in_features
        backend = self.backend if quant.enabled else None
        obstacle = None if inputs % PLANE == 0 else f"{inputs} inputs are not a multiple of {PLANE}"
        if not quant.activations:
            obstacle = "the model does not quantise activations"
        if backend is not None and obstacle is not None:
            report_fallback("packed layers", backend, obstacle)
            backend = None
        if backend is None:
            found = DenseProjection(layers, self.device, self.dtype)
        else:
            found = (FusedProjection if self.fused else PackedProjection)(layers, self.device, backend)
        self.projections.append(found)
        return found


def _packed(layer: BitLinear) -> PackedTernary:
    weight = PackedTernary.pack(layer.ternary())
    return weight if layer.gain == 1 else PackedTernary(weight.packed, weight.scales * layer.gain, weight.columns)


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
