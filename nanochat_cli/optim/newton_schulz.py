"""Approximate orthogonalisation of matrices by Newton-Schulz iteration.

Three coefficient sets: Keller Jordan's fixed quintic (https://kellerjordan.github.io/posts/muon), the per-iteration
optimal ones of Polar Express (arXiv:2505.16932, Algorithm 1, lower bound 1e-3, with its safety factor 1.01), and for
few iterations those of the same algorithm with higher lower bounds, after a tighter scaling than by the Frobenius norm:
by the root of that of X Xᵀ, which the first iteration has computed (CANS, arXiv:2506.10935). Batched over the first
dimension, so that all matrices of a shape cost one bmm each.
"""

from typing import Literal

import torch
from torch import Tensor

from nanochat_kernels import iterate_int8
from nanochat_kernels.linear_products import products_are_exact

Coefficients = Literal["keller-jordan", "polar-express", "cans"]
NumberFormat = Literal["fp32", "bf16", "int8"]

KELLER_JORDAN = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
CANS = {
    3: (
        (7.710969245867686, -22.113754790481167, 16.248743017738473),
        (3.4228836446029183, -2.5659273260427136, 0.5188268917249074),
        (2.39932414288397, -1.7561161067461408, 0.4282779466004987),
    ),
    4: (
        (7.710969245867686, -22.113754790481167, 16.248743017738473),
        (3.9312638257400647, -2.9304353662755105, 0.5596749457786835),
        (3.22869610806222, -2.42128256797511, 0.5024431576878715),
        (2.228255126575062, -1.6031545073533309, 0.4117297264956072),
    ),
}
"""By iterations: with the lower bounds 0.015 and 0.005, which bring those singular values to 0.84 and 0.90."""
SAFETY = 1.01


def coefficients(kind: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of p(x) = a x + b x³ + c x⁵ for every iteration; past a set's end, one that keeps 1."""
    if kind == "keller-jordan":
        return [KELLER_JORDAN] * steps
    optimal = POLAR_EXPRESS if kind == "polar-express" else CANS[3 if steps <= 3 else 4]
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in optimal[:-1]]
    return [*safe, optimal[-1], *[POLAR_EXPRESS[-1]] * steps][:steps]


def divisor(kind: Coefficients) -> float:
    """What a matrix is divided by besides its Frobenius norm."""
    return SAFETY if kind == "polar-express" else 1.0


def tightens(kind: Coefficients) -> bool:
    """Whether it is then also divided by ‖X Xᵀ‖^½."""
    return kind == "cans"


def orthogonalize(
    matrices: Tensor,
    steps: int = 5,
    kind: Coefficients = "keller-jordan",
    eps: float = 1e-7,
    number_format: NumberFormat | None = None,
) -> Tensor:
    """Bring every singular value of matrices [n, R, C] near 1, keeping the singular vectors.

    number_format: of the products, by default bf16 on a GPU. On a CPU it is float32: how fast another one is depends
    on the processor and has to be measured. Returns the same shape and dtype.
    """
    if (number_format or ("bf16" if matrices.is_cuda else "fp32")) == "bf16" and matrices.dtype != torch.bfloat16:
        return orthogonalize(matrices.to(torch.bfloat16), steps, kind, eps).to(matrices.dtype)
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if transposed else matrices
    norm = x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    if number_format == "int8":
        x = torch.div(x, norm * divisor(kind), out=torch.empty(x.shape, device=x.device))  # contiguous, whatever x was
        backend = None if products_are_exact() else "reference"
        for matrix in x:
            iterate_int8(matrix, coefficients(kind, steps), tightens(kind), backend=backend)
        return x.mT if transposed else x
    x = x / norm
    if kind == "polar-express":
        x = x / SAFETY
    for step, (a, b, c) in enumerate(coefficients(kind, steps)):
        gram = torch.bmm(x, x.mT)
        if step == 0 and tightens(kind):
            bound = gram.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
            x, gram = x / bound.sqrt(), gram / bound
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if transposed else x
