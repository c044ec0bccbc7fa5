"""The rounding of a matrix product's input by ggml's CPU backend, in torch.

A ternary or Q4_0 weight is multiplied by activations that ggml quantises to int8 itself, on a finer
grid than our one scale per token; an F16 weight by activations rounded to f16. A comparison of our
model with llama.cpp therefore runs ours under ggml's rounding: `ggml_arithmetic` swaps it in and
restores the model afterwards. Knows nothing of files.

Sources: quantize_row_q8_K_ref and quantize_row_q8_0_ref of ggml-quants.c.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.model.transformer import Transformer


def q8_0(x: Tensor) -> Tensor:
    """Blocks of 32: d = absmax / 127 is stored as f16, but the codes are rounded with the float32 d.

    x: float32 [..., K], K a multiple of 32; same shape back. Rounds half away from zero.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = blocks.abs().amax(dim=-1, keepdim=True) / 127
    inverse = torch.where(d > 0, 1 / d, torch.zeros_like(d))
    codes = blocks * inverse
    codes = codes.sign() * (codes.abs() + 0.5).floor()
    return (codes * d.half().float()).reshape(x.shape)


def q8_k(x: Tensor) -> Tensor:
    """Blocks of 256: the element of largest magnitude maps to -127, and d stays float32.

    x: float32 [..., K], K a multiple of 256; same shape back. Rounds half to even.
    """
    blocks = x.reshape(*x.shape[:-1], -1, 256)
    extreme = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    # A true division: torch computes `-127 / x` as reciprocal times -127, an ulp away from ggml.
    inverse = torch.where(extreme != 0, torch.full_like(extreme, -127) / extreme, torch.zeros_like(extreme))
    codes = (blocks * inverse).round().clamp(max=127)
    d = torch.where(extreme != 0, 1 / inverse, torch.zeros_like(extreme))
    return (codes * d).reshape(x.shape)


def f16(x: Tensor) -> Tensor:
    return x.half().float()


def f32(x: Tensor) -> Tensor:
    return x


ACTIVATION_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "tq2_0": q8_k,
    "tq1_0": q8_k,
    "q2_0": q8_0,
    "q4_0": q8_0,
    "f16": f16,
    "f32": f32,
}
"""By the type of the weight that multiplies the activation."""


@dataclass(frozen=True)
class Jitter:
    """Random relative disturbance of everything before it is rounded, uniform in ± `relative`."""

    relative: float
    seed: int


def _disturbed(rounding: Callable[[Tensor], Tensor], jitter: Jitter | None) -> Callable[[Tensor], Tensor]:
    if jitter is None:
        return rounding
    generator = torch.Generator().manual_seed(jitter.seed)
    return lambda x: rounding(
        x * (1 + jitter.relative * (2 * torch.rand(x.shape, generator=generator) - 1)).to(x.device)
    )


@contextmanager
def ggml_arithmetic(
    model: Transformer, linear_types: Mapping[str, str], head_type: str, jitter: Jitter | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the block, `model` computes as ggml would; yields tokens int64 [B, T] -> logits [B, T, V].

    linear_types: type per dotted name of a linear layer, as `Transformer.linears` names it. Embedding and
    head weights are rounded to `head_type`. `jitter` shows which results depend on a value halfway between
    two codes. Everything is restored at the end, even after an error.
    """
    embedding, head = model.embedding.weight, model.unembedding
    originals = {id(parameter): (parameter, parameter.data) for parameter in (embedding, head)}
    rounded_head = _disturbed(ACTIVATION_ROUNDING[head_type], jitter)
    layers = list(model.linears())
    try:
        for parameter, data in originals.values():
            parameter.data = ACTIVATION_ROUNDING[head_type](data)
        for name, layer in layers:
            # The instance attribute shadows the method: it also reaches layers that quantise nothing in our runtime.
            setattr(layer, "quantize_input", _disturbed(ACTIVATION_ROUNDING[linear_types[name]], jitter))  # noqa: B010
            if not layer.quant.enabled:
                originals[id(layer.weight)] = (layer.weight, layer.weight.data)
                layer.weight.data = ACTIVATION_ROUNDING[linear_types[name]](layer.weight.data)
        with torch.no_grad():
            yield lambda tokens: model.logits(rounded_head(model(tokens)))
    finally:
        for parameter, data in originals.values():
            parameter.data = data
        for _, layer in layers:
            layer.__dict__.pop("quantize_input", None)
