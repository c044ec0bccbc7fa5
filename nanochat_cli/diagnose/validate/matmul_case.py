"""A ternary matrix with activations, and what a kernel backend computes from them.

A case is a few numbers from which every process builds the same tensors, so that only results travel between them.
Knows the operations of `nanochat_kernels` by name; comparing is left to `three_way_parity`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from nanochat_kernels import Granularity, PackedTernary, QuantizedActivations, Ternary
from nanochat_kernels.backends import Backend, Unsupported, load

Weights = Literal["random", "zeros", "signs"]
Activations = Literal["random", "zeros"]
NORM_EPS = 1e-5
GRID_BLOCK = 32
"""Every block of this many grid activations holds a ±127, so that int8 quantisers of any block size keep the codes."""


@dataclass(frozen=True)
class MatmulCase:
    """A product of `tokens` activations with a [rows, columns] matrix.

    weights: random, all zero, or of one magnitude (every code ±1). magnitude: mean |w| of the latent, which becomes the
    weight scale.
    """

    rows: int
    columns: int
    tokens: int
    granularity: Granularity = "row"
    weights: Weights = "random"
    activations: Activations = "random"
    magnitude: float = 0.02
    activation_magnitude: float = 1.0

    def __str__(self) -> str:
        special = [
            "" if self.weights == "random" else f"weights {self.weights}",
            "" if self.activations == "random" else f"activations {self.activations}",
            "" if self.magnitude == 0.02 else f"weight scale {self.magnitude:g}",
            "" if self.activation_magnitude == 1 else f"activations ×{self.activation_magnitude:g}",
        ]
        parts = [f"{self.rows}×{self.columns}", f"M {self.tokens}", f"scale {self.granularity}", *filter(None, special)]
        return ", ".join(parts)

    @property
    def group(self) -> int | None:
        """Inputs per weight scale; None for one scale per row or tensor."""
        return self.granularity if isinstance(self.granularity, int) else None

    def _generator(self, purpose: str) -> torch.Generator:
        """A generator seeded by the text of the case: the same in every process, whatever was drawn before."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self}: {purpose}".encode()))

    @cached_property
    def latent(self) -> Tensor:
        """float32 [rows, columns]."""
        shape = (self.rows, self.columns)
        if self.weights == "zeros":
            return torch.zeros(shape)
        if self.weights == "signs":
            return self.magnitude * (2.0 * torch.randint(0, 2, shape, generator=self._generator("latent")) - 1)
        spread = self.magnitude * 1.2533  # E|x| of a normal is 0.798 σ
        return torch.randn(shape, generator=self._generator("latent")) * spread

    @cached_property
    def x(self) -> Tensor:
        """Activations before quantisation: float32 [tokens, columns], each token with another magnitude."""
        if self.activations == "zeros":
            return torch.zeros(self.tokens, self.columns)
        magnitudes = torch.logspace(-2, 0, self.tokens).unsqueeze(1) * self.activation_magnitude
        return torch.randn(self.tokens, self.columns, generator=self._generator("x")).clamp(-4, 4) / 4 * magnitudes

    @cached_property
    def other(self) -> Tensor:
        """A second input, shaped like `x`, for the gated form."""
        return torch.randn(self.tokens, self.columns, generator=self._generator("other"))

    @cached_property
    def norm_weight(self) -> Tensor:
        return 1 + 0.1 * torch.randn(self.columns, generator=self._generator("norm_weight"))

    @cached_property
    def grid(self) -> Tensor:
        """Activation codes int8 [tokens, columns], which every int8 quantiser recovers from grid · scale."""
        if self.activations == "zeros":
            return torch.zeros(self.tokens, self.columns, dtype=torch.int8)
        codes = torch.randint(-127, 128, (self.tokens, self.columns), generator=self._generator("grid"))
        extremes = 254 * torch.randint(0, 2, codes[:, ::GRID_BLOCK].shape, generator=self._generator("signs")) - 127
        codes[:, ::GRID_BLOCK] = extremes
        return codes.to(torch.int8)

    @cached_property
    def grid_scale(self) -> Tensor:
        """float32 [tokens, 1]: arbitrary positive numbers."""
        return torch.logspace(-3, -1, self.tokens).unsqueeze(1) * self.activation_magnitude

    @cached_property
    def ternary(self) -> Ternary:
        """Codes and scales according to the reference."""
        return load("reference").ternarize(self.latent, self.granularity)

    @cached_property
    def packed(self) -> PackedTernary:
        return PackedTernary.pack(self.ternary)


Results = dict[str, Tensor]
"""Tensors on the CPU by `operation.part`; the parts `integers` and `values` of a product are exact and scaled."""


def compute(case: MatmulCase, backend: Backend, device: torch.device | str = "cpu") -> tuple[Results, dict[str, str]]:
    """The results of `backend` for a case on `device`, and the operations that it does not support, with the reason.

    Never falls back to another backend. Raises Unsupported if the backend does not exist here at all.
    """
    module = load(backend)
    results: Results = {}
    unsupported: dict[str, str] = {}
    for name, operation in _OPERATIONS.items():
        if not hasattr(module, name):
            unsupported[name] = "not implemented"
            continue
        try:
            parts = operation(module, case, torch.device(device))
        except Unsupported as reason:
            unsupported[name] = str(reason)
            continue
        results |= {f"{name}.{part}": tensor.cpu() for part, tensor in parts.items()}
    return results, unsupported


def _ternarize(module: Any, case: MatmulCase, device: torch.device) -> Results:
    ternary = module.ternarize(case.latent.to(device), case.granularity)
    return {"codes": ternary.codes, "scales": ternary.scales}


def _ternarize_packed(module: Any, case: MatmulCase, device: torch.device) -> Results:
    ternary = module.ternarize_packed(case.latent.to(device), case.granularity)
    return {"packed": ternary.packed, "scales": ternary.scales}


def _unpack(module: Any, case: MatmulCase, device: torch.device) -> Results:
    return {"codes": module.unpack(case.packed.to(device), torch.int8)}


def _quantize_activations(module: Any, case: MatmulCase, device: torch.device) -> Results:
    return module.quantize_activations(case.x.to(device), case.group)._asdict()


def _rmsnorm_quantize(module: Any, case: MatmulCase, device: torch.device) -> Results:
    weight = case.norm_weight.to(device)
    return module.rmsnorm_quantize(case.x.to(device), weight, NORM_EPS, case.group)._asdict()


def _swiglu_quantize(module: Any, case: MatmulCase, device: torch.device) -> Results:
    return module.swiglu_quantize(case.x.to(device), case.other.to(device), case.group)._asdict()


def _ternary_matmul(module: Any, case: MatmulCase, device: torch.device) -> Results:
    """Once with scales of one, so that the product is a small integer and exact in float32, and once with real ones."""
    packed = case.packed.to(device)
    ones = PackedTernary(packed.packed, torch.ones_like(packed.scales), packed.columns)
    codes = case.grid.to(device)
    groups = (case.tokens, packed.n_groups, packed.group)
    sums = codes.reshape(groups).sum(dim=-1, dtype=torch.int32)
    scale = case.grid_scale.to(device)
    integers = module.ternary_matmul(QuantizedActivations(codes, torch.ones_like(scale), sums), ones)
    values = module.ternary_matmul(QuantizedActivations(codes, scale, sums), packed)
    return {"integers": integers, "values": values}


def _packed_linear(module: Any, case: MatmulCase, device: torch.device) -> Results:
    """Quantisation and product in one, for grid · scale, whose codes are the grid again."""
    x = (case.grid * case.grid_scale).to(device)
    return {"values": module.packed_linear(x, case.packed.to(device))}


def _int8_matmul(module: Any, case: MatmulCase, device: torch.device) -> Results:
    if case.group is not None:
        return {}
    a, b = case.grid.to(device), case.ternary.codes.to(device)
    a_scale, b_scale = case.grid_scale.to(device), case.ternary.scales.to(device)
    integers = module.int8_matmul(a, b, torch.ones_like(a_scale), torch.ones_like(b_scale))
    return {"integers": integers, "values": module.int8_matmul(a, b, a_scale, b_scale)}


_OPERATIONS: dict[str, Callable[[Any, MatmulCase, torch.device], Results]] = {
    "ternarize": _ternarize,
    "ternarize_packed": _ternarize_packed,
    "unpack": _unpack,
    "quantize_activations": _quantize_activations,
    "rmsnorm_quantize": _rmsnorm_quantize,
    "swiglu_quantize": _swiglu_quantize,
    "ternary_matmul": _ternary_matmul,
    "packed_linear": _packed_linear,
    "int8_matmul": _int8_matmul,
}
