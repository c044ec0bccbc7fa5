"""A whole step of Muon in one native call, where this CPU has the products for it: see cpu/source/muon.c."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported, report_fallback, requested_backend
from nanochat_kernels.cpu.native import library

NO_MEMORY = -1


def muon_step_int8(
    gradients: Sequence[Tensor],
    momenta: Tensor,
    weights: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    *,
    momentum: float,
    nesterov: bool,
    limit: float,
    tighten: bool,
    decay: float,
    rate: float,
) -> bool:
    """Update momenta [n, R, C] and weights, which become decay · w + rate · NewtonSchulz(u), in place.

    gradients, weights: float32, each of one or more matrices [R, C], n in all. coefficients: (a, b, c) of each
    iteration; limit: what u is divided by besides its norm; tighten: see `reference.orthogonalize`. Returns False, with
    nothing changed, where this is not possible: on other devices, without AVX-512 VNNI, with other memory layouts.
    """
    tensors = (momenta, *gradients, *weights)
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors)
    if not fits or requested_backend() == "reference":
        return False
    n, rows, columns = momenta.shape
    size = 4 * rows * columns
    starts = [
        [t.data_ptr() + i * size for t in stack for i in range(4 * t.numel() // size)]
        for stack in (gradients, (momenta,), weights)
    ]
    places = [place for matrix in zip(*starts, strict=True) for place in matrix]
    flat = [value for triple in coefficients for value in triple]
    try:
        status = library().nk_muon(
            *((ctypes.c_void_p * len(places))(*places), n, rows, columns, momentum, 1 - momentum, nesterov),
            *((ctypes.c_float * len(flat))(*flat), len(coefficients), limit, tighten, decay, rate),
        )
    except Unsupported as reason:
        report_fallback("muon_step_int8", "cpu", str(reason))
        return False
    if status == NO_MEMORY:
        raise MemoryError("no memory to orthogonalise a matrix")
    return status == 0
