"""The subspace of a gradient's largest singular values, by randomised SVD (arXiv:0909.4061, Algorithms 4.4 and 5.1)."""

import torch
from torch import Tensor


def leading_basis(
    matrices: Tensor, rank: int, *, oversampling: int, power_iterations: int, generator: torch.Generator
) -> Tensor:
    """Orthonormal columns that span about the `rank` leading left singular vectors, the largest first.

    matrices: float32 [n, S, L], rank ≤ S ≤ L. Returns [n, S, rank]. The random directions are the same for every
    matrix and drawn on the CPU: a result depends neither on its neighbours nor on the device.
    """
    short, long = matrices.shape[-2:]
    directions = torch.randn(long, min(rank + oversampling, short), generator=generator).to(matrices.device)
    scaled = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    basis = torch.linalg.qr(scaled @ directions).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(scaled @ (scaled.mT @ basis)).Q
    inside = basis.mT @ scaled
    vectors = torch.linalg.eigh(inside @ inside.mT).eigenvectors  # eigenvalues ascend
    return basis @ vectors[..., -rank:].flip(-1)


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose stream depends on the numbers and nothing else."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)
