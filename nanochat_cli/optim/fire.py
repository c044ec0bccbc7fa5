"""FIRE: the nearest isometry of a matrix, by Newton-Schulz iteration (arXiv:2602.08040).

Knows stacks of matrices [n, R, C], all of one shape, and computes in float64. `training.methods.fire` decides which
matrices, when, and what follows.

    SFE = ‖W − W̃‖²_F   squared Frobenius error: how far the new weights are from the old ones
    DfI = ‖W̃ᵀW̃ − I‖²_F  deviation from isometry, on the shorter side of a matrix

Of all isometries the polar factor U Vᵀ of W = U S Vᵀ has the smallest SFE (orthogonal Procrustes problem).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanochat_cli.optim.newton_schulz import SAFETY, coefficients

Method = Literal["newton-schulz", "polar-express"]
Scale = Literal["paper", "preserve_norm", "fan_in"]

CUBIC = (1.5, -0.5, 0.0)
"""Newton-Schulz: p(x) = 1.5 x − 0.5 x³, whose fixed point 1 attracts all of (0, √3)."""
SQUARINGS = 5


class PolarFactor(NamedTuple):
    """matrices: float64 [n, R, C]; deviation: float64 [n], their DfI; iterations: the same for all."""

    matrices: Tensor
    deviation: Tensor
    iterations: int


@dataclass(frozen=True)
class Change:
    """The change of one matrix. The relative SFE is SFE / ‖W‖²_F.

    dfi: as in the paper, for the old weights, and for the isometry before it is scaled. deviation_before: without the
    effect of scale, see `relative_deviation`.
    """

    rank: int
    sfe: float
    relative_sfe: float
    dfi_before: float
    dfi_after: float
    deviation_before: float
    iterations: int
    reached: bool


def gram(matrices: Tensor) -> Tensor:
    """WᵀW of tall matrices, W Wᵀ of wide ones: float64 [n, k, k], k = min(R, C)."""
    tall = _upright(matrices.double())
    return tall.mT @ tall


def deviation_from_isometry(matrices: Tensor) -> Tensor:
    """DfI, float64 [n]: 0 exactly when all singular values are 1."""
    return _deviation(gram(matrices))


def relative_deviation(matrices: Tensor) -> Tensor:
    """DfI per rank of matrices scaled to singular values of mean square 1, float64 [n].

    It is the variance of the squared singular values in units of their mean: 0 for a multiple of an isometry, about
    min(R, C) / max(R, C) for a random matrix (Marchenko-Pastur). NaN for a matrix of zeros.
    """
    products = gram(matrices)
    rank = products.shape[-1]
    mean = products.diagonal(dim1=-2, dim2=-1).sum(-1) / rank
    return products.square().sum((-2, -1)) / (rank * mean.square()) - 1


def spectral_norm(matrices: Tensor) -> Tensor:
    """An upper bound of the largest singular value, float64 [n], too large by at most a factor k^(1/128).

    The power method on the whole Gram matrix at once: ‖Gᵐ‖_F^(1/m), m = 2^5 by repeated squaring. Without a start
    vector, which could miss the direction, it never falls below the norm.
    """
    power = gram(matrices)
    logarithm = torch.zeros(len(power), dtype=torch.float64, device=power.device)
    for step in range(SQUARINGS + 1):
        size = power.norm(dim=(-2, -1)).clamp(min=torch.finfo(torch.float64).tiny)
        logarithm += size.log() / 2**step
        if step < SQUARINGS:
            power = power / size[:, None, None]
            power = power @ power
    return (logarithm / 2).exp()


@torch.no_grad()
def polar_factor(
    matrices: Tensor, *, method: Method = "newton-schulz", target: float = 1e-6, max_iterations: int = 60
) -> PolarFactor:
    """U Vᵀ of every matrix of [n, R, C], iterated until every DfI is below `target`, or to the bound.

    A matrix that has converged stays unchanged while others continue. Singular values of exactly 0 stay 0: the DfI
    of such a matrix does not fall below their number.
    """
    x = _upright(matrices.double())
    x = x / spectral_norm(x)[:, None, None]
    if method == "polar-express":
        x = x / SAFETY
        polynomials = coefficients("polar-express", max_iterations)
    else:
        polynomials = [CUBIC] * max_iterations
    iterations = 0
    product = x.mT @ x
    deviation = _deviation(product)
    for a, b, c in polynomials:
        # A tenth of the target: DfI is measured again on the float32 weights.
        if bool((deviation <= 0.1 * target).all()):
            break
        inner = torch.baddbmm(product, product, product, beta=b, alpha=c) if c else b * product
        x = torch.baddbmm(x, x, inner, beta=a)
        product = x.mT @ x
        deviation = _deviation(product)
        iterations += 1
    return PolarFactor(x.mT if _is_wide(matrices) else x, deviation, iterations)


def scale_of(kind: Scale, matrices: Tensor) -> Tensor:
    """The factor on the isometry of each matrix of [n, out, in], float64 [n].

    paper: sqrt(out / in). preserve_norm: the root mean square of the old singular values, so that ‖W̃‖_F = ‖W‖_F.
    fan_in: 1 / sqrt(in).
    """
    rows, columns = matrices.shape[-2:]
    if kind == "preserve_norm":
        return matrices.double().norm(dim=(-2, -1)) / math.sqrt(min(rows, columns))
    value = math.sqrt(rows / columns) if kind == "paper" else 1 / math.sqrt(columns)
    return torch.full((len(matrices),), value, dtype=torch.float64, device=matrices.device)


@torch.no_grad()
def reinitialize(
    matrices: Tensor,
    *,
    method: Method = "newton-schulz",
    target: float = 1e-6,
    max_iterations: int = 60,
    scale: Scale = "preserve_norm",
) -> tuple[Tensor, list[Change]]:
    """Scaled nearest isometries of matrices [n, R, C], in their shape and dtype, and what changed in each."""
    factor = polar_factor(matrices, method=method, target=target, max_iterations=max_iterations)
    new = (factor.matrices * scale_of(scale, matrices)[:, None, None]).to(matrices.dtype)
    before = matrices.double()
    sfe = (new.double() - before).square().sum((-2, -1))
    relative = sfe / before.square().sum((-2, -1))
    dfi_before = deviation_from_isometry(matrices)
    dfi_after = deviation_from_isometry(factor.matrices.to(matrices.dtype))
    columns = torch.stack((sfe, relative, dfi_before, dfi_after, relative_deviation(matrices)), dim=1).tolist()
    rank = min(matrices.shape[-2:])
    return new, [
        Change(rank, *row, iterations=factor.iterations, reached=row[3] <= target)  # the five columns, in their order
        for row in columns
    ]


def _is_wide(matrices: Tensor) -> bool:
    return matrices.shape[-1] > matrices.shape[-2]


def _upright(matrices: Tensor) -> Tensor:
    return matrices.mT if _is_wide(matrices) else matrices


def _deviation(product: Tensor) -> Tensor:
    identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
    return (product - identity).square().sum((-2, -1))
