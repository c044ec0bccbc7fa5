"""Approximate orthogonalisation of matrices by Newton-Schulz iteration.

Two coefficient sets: Keller Jordan's fixed quintic (https://kellerjordan.github.io/posts/muon) and the
per-iteration optimal ones of Polar Express (arXiv:2505.16932, Algorithm 1, lower bound 1e-3, with its
safety factor 1.01). Batched over the first dimension, so that all matrices of a shape cost one bmm each.
"""

from typing import Literal

import torch
from torch import Tensor

from nanochat_kernels import iterate_int8
from nanochat_kernels.linear_products import products_are_exact

Coefficients = Literal["keller-jordan", "polar-express"]
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
SAFETY = 1.01


def coefficients(kind: Coefficients, steps: int) -> list[tuple[float, float, float]]:
    """(a, b, c) of p(x) = a x + b x³ + c x⁵ for every iteration; the last Polar Express triple repeats."""
    if kind == "keller-jordan":
        return [KELLER_JORDAN] * steps
    triples = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]] + [POLAR_EXPRESS[-1]]
    return [triples[min(step, len(triples) - 1)] for step in range(steps)]


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
        limit = SAFETY if kind == "polar-express" else 1.0
        x = torch.div(x, norm * limit, out=torch.empty(x.shape, device=x.device))  # contiguous, whatever x was
        backend = None if products_are_exact() else "reference"
        for matrix in x:
            iterate_int8(matrix, coefficients(kind, steps), backend=backend)
        return x.mT if transposed else x
    x = x / norm
    if kind == "polar-express":
        x = x / SAFETY
    for a, b, c in coefficients(kind, steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if transposed else x
