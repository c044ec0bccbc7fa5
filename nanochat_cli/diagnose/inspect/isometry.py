"""How far the matrices of a model are from isometries, and how far FIRE would move them (arXiv:2602.08040).

Read-only. Singular values come from `torch.linalg.svdvals`, not from the iteration that FIRE uses.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LARGEST_CONDITION = 1e4
"""Beyond it a direction of the input hardly passes a layer; a fresh square matrix of width 1024 has some 1e3 to 1e4."""
LARGEST_DEVIATION = 4.0
"""In units of a random matrix of the shape."""


@dataclass(frozen=True)
class MatrixIsometry:
    """One matrix, with k singular values s.

    deviation: DfI per rank of the matrix scaled to mean s² = 1, which is k Σ s⁴ / (Σ s²)² − 1; 0 for a multiple of an
    isometry. against_random: the same in units of a random matrix of the shape. relative_sfe: Σ (s − rms s)² / Σ s²,
    what FIRE would move with fire.scale = preserve_norm. effective_rank: (Σ s²)² / Σ s⁴, as a share of k.
    """

    name: str
    shape: tuple[int, int]
    deviation: float
    against_random: float
    relative_sfe: float
    condition: float
    spectral_norm: float
    effective_rank: float

    def warnings(self) -> list[str]:
        """What stands out; empty when nothing does."""
        if self.spectral_norm == 0:
            return ["all zeros"]
        found = []
        if not self.condition <= LARGEST_CONDITION:
            found.append(f"condition {self.condition:.1e}")
        if self.against_random > LARGEST_DEVIATION:
            found.append("far from an isometry")
        return found

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "warnings": self.warnings()}


@torch.no_grad()
def measure_isometry(layers: Iterable[tuple[str, Tensor]]) -> list[MatrixIsometry]:
    """layers: names and stacks [n, out, in] of matrices; one of several is named `layer#index`."""
    found = []
    for name, matrices in layers:
        for index, values in enumerate(torch.linalg.svdvals(matrices.double())):
            label = name if len(matrices) == 1 else f"{name}#{index}"
            found.append(of_singular_values(label, (matrices.shape[1], matrices.shape[2]), values))
    return found


def of_singular_values(name: str, shape: tuple[int, int], values: Tensor) -> MatrixIsometry:
    """values: float64 [k], descending. A matrix of zeros has no deviation and an infinite condition."""
    squares = values.square()
    largest, smallest, energy = float(values[0]), float(values[-1]), float(squares.sum())
    if energy == 0:
        return MatrixIsometry(name, shape, 0.0, 0.0, 0.0, float("inf"), 0.0, 0.0)
    rank = len(values)
    deviation = rank * float(squares.square().sum()) / energy**2 - 1
    moved = (values - (energy / rank) ** 0.5).square().sum()
    return MatrixIsometry(
        name=name,
        shape=shape,
        deviation=deviation,
        against_random=deviation * max(shape) / min(shape),
        relative_sfe=float(moved) / energy,
        condition=largest / smallest if smallest else float("inf"),
        spectral_norm=largest,
        effective_rank=1 / (1 + deviation),
    )
