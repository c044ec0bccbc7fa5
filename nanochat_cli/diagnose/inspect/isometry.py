"""How far the matrices of a model are from isometries, and how far FIRE would move them (arXiv:2602.08040).

Read-only. Singular values come from `torch.linalg.svdvals`, not from FIRE's own iteration.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LARGEST_CONDITION = 1e4
"""Beyond it some direction of the input hardly passes the layer; a new square matrix of width 1024 has 1e3 to 1e4."""
LARGEST_DEVIATION = 4.0
"""In units of a random matrix's deviation."""


@dataclass(frozen=True)
class MatrixIsometry:
    """One matrix, with k singular values s.

    deviation: DfI per rank of the matrix scaled to mean s² = 1, which is k Σ s⁴ / (Σ s²)² − 1; 0 for a multiple of an
    isometry. against_random: the same, relative to a random matrix of that shape. relative_sfe: Σ (s − rms s)² / Σ s²,
    how far FIRE would move it with fire.scale = preserve_norm. effective_rank: (Σ s²)² / Σ s⁴, as a share of k.
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
        """Short texts about what is unusual."""
        if self.spectral_norm == 0:
            return ["all zeros"]
        warnings = []
        if not self.condition <= LARGEST_CONDITION:
            warnings.append(f"condition {self.condition:.1e}")
        if self.against_random > LARGEST_DEVIATION:
            warnings.append("far from an isometry")
        return warnings

    def as_dict(self) -> dict[str, object]:
        return {**asdict(self), "warnings": self.warnings()}


@torch.no_grad()
def measure_isometry(layers: Iterable[tuple[str, Tensor]]) -> list[MatrixIsometry]:
    """layers: names and stacks [n, out, in] of matrices; a matrix of a larger stack is named `layer#index`."""
    measured = []
    for name, matrices in layers:
        for index, values in enumerate(torch.linalg.svdvals(matrices.double())):
            label = name if len(matrices) == 1 else f"{name}#{index}"
            measured.append(isometry_from(label, (matrices.shape[1], matrices.shape[2]), values))
    return measured


def isometry_from(name: str, shape: tuple[int, int], values: Tensor) -> MatrixIsometry:
    """values: singular values, float64 [k], descending. For zeros the deviation is 0 and the condition infinite."""
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
