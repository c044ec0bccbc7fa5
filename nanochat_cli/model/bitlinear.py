"""BitLinear: a linear layer with ternary weights and int8 activations (arXiv:2402.17764), no bias; `Joint` of several.

Holds the latent float32 weight, which the optimizer trains, and its quantised forms, which the forward pass uses.
`requantize` derives the second from the first; the trainer calls it once after every optimizer step. Quantizers
and products live in `nanochat_kernels`.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.model.norm import RMSNorm
from nanochat_kernels import (
    FOUR_BIT,
    Backward,
    Form,
    KeptRows,
    LinearWeight,
    PackedTernary,
    QuantizedInput,
    Ternary,
    bit_linear,
    bit_linears,
    fake_ternarize,
    mix_activations,
    nvfp4_ternary,
    pack_plane128,
    quantize_input,
    ternarize,
    ternarize_rows,
)

Phase = Literal["float", "ramp", "ternary"]
"""What a layer multiplies with: the latent, something between it and the ternary weight, or the ternary weight."""


class BitLinear(nn.Module):
    """y = Q(x) · Wᵀ, W = codes · scales. With `quant.enabled = false` it is a plain float linear with nothing else.

    form: how the product is computed in training; the values are the same, but for NVFP4. backward: how its gradients
    are, in which it may round. phase: training may begin in float, see `use_phase`. kept: rows of the batch that take
    part in the backward pass, None: all.
    """

    operand: Tensor
    scales: Tensor
    packed: Tensor | None
    transposed: Tensor | None
    share: Tensor | None
    mixed: Tensor | None

    def __init__(self, in_features: int, out_features: int, quant: QuantConfig) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.quant = quant
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.gain = 1.0
        """Factor on the output, of a layer read from a file that has one; 1 in training."""
        self.form: Form = "float"
        self.backward: Backward = "exact"
        self.phase: Phase = "ternary" if quant.enabled else "float"
        self.kept: KeptRows | None = None
        self._loaded: Ternary | None = None
        if quant.enabled:
            groups = in_features // quant.scale if isinstance(quant.scale, int) else 1
            self.register_buffer("operand", torch.empty(out_features, in_features), persistent=False)
            self.register_buffer("scales", torch.empty(out_features, groups), persistent=False)
            self.register_buffer("packed", None, persistent=False)
            self.register_buffer("transposed", None, persistent=False)
        self.register_buffer("share", None, persistent=False)
        self.register_buffer("mixed", None, persistent=False)

    def quantize_input(self, x: Tensor) -> QuantizedInput | Tensor:
        """Quantised x, to be shared by all layers that read the same input."""
        if self.phase == "float" or not self.quant.activations:
            return x
        if self.phase == "ramp":
            assert self.share is not None
            return mix_activations(x, self.share)
        four_bit = self.form in FOUR_BIT  # in training only: what is exported is int8
        return quantize_input(x, "float" if four_bit and not self.training else self.form, self.kept)

    def project(self, quantized: QuantizedInput | Tensor) -> Tensor:
        """The matrix product alone. quantized: [..., in], from `quantize_input` or any tensor. Returns [..., out]."""
        if self.phase == "ternary":
            y = bit_linear(quantized, self.weight, self.quantized_weight(), self.kept, self.backward)
        elif self.phase == "ramp" or self.kept is not None:
            y = bit_linear(quantized, self.weight, self.float_weight(), self.kept)
        else:
            assert isinstance(quantized, Tensor)
            y = nn.functional.linear(quantized, self.weight)
        return y if self.gain_afterwards == 1 else y * self.gain_afterwards

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.quantize_input(x))

    def quantized_weight(self) -> LinearWeight:
        """What the forward pass multiplies with: the gain is in the scales of rows, as in packed weights."""
        if self.scales.shape[1] > 1:
            return LinearWeight(self.operand, None, self.packed, self.scales, self.transposed)
        scales = self.scales if self.gain == 1 else self.scales * self.gain
        return LinearWeight(self.operand, scales.squeeze(1), self.packed, scales, self.transposed)

    def float_weight(self) -> LinearWeight:
        """What the forward pass multiplies with before the layer is ternary: the latent, or what `requantize` mixed."""
        return LinearWeight(self.weight.detach() if self.mixed is None else self.mixed, None)

    @property
    def gain_afterwards(self) -> float:
        """The factor on the output that `quantized_weight` does not have."""
        return 1.0 if self.quant.enabled and self.scales.shape[1] == 1 else self.gain

    def ternary(self) -> Ternary:
        """Codes and scales of this layer as it computes now. RuntimeError for a float layer."""
        if not self.quant.enabled:
            raise RuntimeError("a float linear has no ternary codes")
        return self._loaded or ternarize(self.weight, self.quant.scale)

    @torch.no_grad()
    def use_form(self, form: Form, backward: Backward = "exact", dtype: torch.dtype = torch.float32) -> None:
        """Compute training in these forms from now on. Raises ValueError for `int8` of inputs that cannot be packed.

        dtype: in which codes are held; the effective weight of groups is in float32. With form and backward in int8,
        and on CUDA with one of them, one copy of the codes in int8 serves all three products; there gradients in int8
        take another one, transposed.
        """
        if not self.quant.enabled:
            return
        self.form, self.backward = form, backward
        cuda = self.weight.is_cuda
        in_int8 = self.computes_in_int8(form, backward, cuda)
        self.operand = self.operand.to(torch.int8 if in_int8 else dtype if self.scales.shape[1] == 1 else torch.float32)
        self.packed = PackedTernary.pack(self.ternary()).packed if form == "int8" and not in_int8 else None
        if form == "nvfp4":
            self.packed = nvfp4_ternary(self.ternary().codes)
        self.transposed = self.operand.T.contiguous() if in_int8 and cuda and backward == "int8" else None

    def computes_in_int8(self, form: Form, backward: Backward, cuda: bool) -> bool:
        """Whether its codes are held in int8 alone."""
        return self.quant.enabled and self.scales.shape[1] == 1 and (backward == "int8" or (cuda and form == "int8"))

    @torch.no_grad()
    def use_phase(self, phase: Phase, share: Tensor | None = None) -> None:
        """Multiply with these weights from the next `requantize` on; a float layer stays one.

        share: λ of a ramp, float32, 0-dim: w + λ · (ternary − w) and x + λ · (rounded − x). It is read where the layer
        computes, so that a compiled layer need not be compiled again when its value changes.
        """
        if self.quant.enabled:
            ramps = phase == "ramp"
            self.phase, self.share = phase, share if ramps else None
            self.mixed = torch.empty_like(self.weight.detach()) if ramps else None

    def mix(self) -> None:
        """`requantize` of a layer in a ramp."""
        assert self.mixed is not None
        assert self.share is not None
        self.mixed.copy_(self.weight + self.share * (fake_ternarize(self.weight, self.quant.scale) - self.weight))

    def requantize(self) -> None:
        """`requantize` of this layer."""
        requantize([self])

    @torch.no_grad()
    def set_ternary(self, ternary: Ternary) -> None:
        """Use exactly these codes and scales (read from a file) from now on; the latent becomes their product."""
        if self.scales.shape[1] != ternary.scales.shape[1]:
            self.scales = self.scales.new_empty(self.out_features, ternary.scales.shape[1])
        self.follow(ternary)
        self.weight.copy_(ternary.dequantize())

    def follow(self, ternary: Ternary) -> None:
        """Use exactly these codes and scales from now on, whatever the latent is."""
        self.hold(ternary)
        self._loaded = ternary

    def hold(self, ternary: Ternary) -> None:
        """Compute with these codes and scales until the latent is quantised again; in place."""
        self.scales.copy_(ternary.scales)
        self.operand.copy_(ternary.codes if self.scales.shape[1] == 1 else ternary.dequantize())
        if self.packed is not None:
            self.packed.copy_((nvfp4_ternary if self.form == "nvfp4" else pack_plane128)(ternary.codes))
        self._transpose()

    def _transpose(self) -> None:
        if self.transposed is not None:
            self.transposed.copy_(self.operand.T)


@torch.no_grad()
def requantize(layers: Iterable[BitLinear]) -> None:
    """Refresh the quantised forms from the latents; in place, so that compiled code keeps its pointers.

    With one scale per row, a GPU takes one launch for all layers of a shape: between steps it waits for the host.
    """
    layers = list(layers)
    for layer in layers:
        if layer.phase == "ramp":
            layer.mix()
    stale = [layer for layer in layers if layer.phase == "ternary" and layer._loaded is None]
    rows = [layer for layer in stale if layer.quant.scale == "row"]
    if rows:
        planes = (None if layer.form == "nvfp4" else layer.packed for layer in rows)
        held = ((layer.weight, layer.scales, layer.operand, packed) for layer, packed in zip(rows, planes, strict=True))
        ternarize_rows(*zip(*held, strict=True))
        for layer in rows:
            if layer.form == "nvfp4" and layer.packed is not None:
                layer.packed.copy_(nvfp4_ternary(layer.operand))
    for layer in stale:
        if layer.quant.scale == "row":
            layer._transpose()
        else:
            layer.hold(ternarize(layer.weight, layer.quant.scale))


def project_all(layers: Sequence[BitLinear], quantized: QuantizedInput | Tensor) -> Sequence[Tensor]:
    """`project` of layers that read one input, with one backward pass for all of them."""
    if not all(layer.phase == "ternary" and layer.gain == 1 for layer in layers):
        return [layer.project(quantized) for layer in layers]
    weights = [layer.quantized_weight() for layer in layers]
    return bit_linears(quantized, [layer.weight for layer in layers], weights, layers[0].kept, layers[0].backward)


class Joint:
    """Layers that read one input, as one operation. x: [..., K], before the norm where one is given.

    An operation is what a block is written in and what packing exchanges. It refers to layers; the block owns them.
    """

    def __init__(self, *layers: BitLinear) -> None:
        self.layers = layers

    def outputs(self, x: Tensor, norm: RMSNorm | None = None) -> Sequence[Tensor]:
        """[..., N] of each layer, from one quantisation."""
        return project_all(self.layers, self.layers[0].quantize_input(x if norm is None else norm(x)))

    def output(self, x: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[..., N] of the only layer."""
        (layer,) = self.layers
        return layer(x if norm is None else norm(x))

    def after_swiglu(self, gate: Tensor, up: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """`output` of silu(gate) · up, [..., K] each (arXiv:2002.05202)."""
        return self.output(nn.functional.silu(gate) * up, norm)
