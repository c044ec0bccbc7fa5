"""What a step of Muon costs on a CPU, and how close its few iterations come to the orthogonal factor.

    nanochat train --preset quickstart --set checkpoint.interval=40 --name momenta    # any run with checkpoints
    python benchmarks/optimizer_step.py runs/momenta [--rounds 7] [--shapes 5.5M 20M]

Quality: momenta of the run's checkpoints, orthogonalised with every set of coefficients in every number format, against
U Vᵀ of their singular value decomposition in float64: cosine of the angle, root mean square of the distance of singular
values from 1. Runs are the matrices of a shape in all checkpoints. Time: whole compiled training steps of models of
`qat_overhead.py`, gradients in int8, every form of the step in turns: milliseconds of the optimizer (clipping, step,
requantisation), its share, and the rate. The first form iterates by torch's integer products.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.qat_overhead import BATCH, SEQ_LEN, SHAPES, Contender
from nanochat_cli.optim import muon
from nanochat_cli.optim.newton_schulz import Coefficients, NumberFormat, orthogonalize
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results
from nanochat_kernels.muon import muon_step_int8

SETS: tuple[tuple[Coefficients, int], ...] = (
    ("keller-jordan", 5),
    ("keller-jordan", 4),
    ("keller-jordan", 3),
    ("polar-express", 5),
    ("polar-express", 4),
    ("polar-express", 3),
    ("cans", 4),
    ("cans", 3),
)
FORMATS: tuple[NumberFormat, ...] = ("fp32", "bf16", "int8")
BEFORE = "keller-jordan 5, products by torch"
TIMED: dict[str, tuple[Coefficients, int]] = {
    BEFORE: ("keller-jordan", 5),
    **{f"{kind} {steps}": (kind, steps) for kind, steps in (SETS[0], *SETS[-2:])},
}


def momenta(run: Path) -> dict[str, Tensor]:
    """Shape → float64 [n, R, C], R ≤ C, of all checkpoints."""
    found: dict[str, list[Tensor]] = {}
    for file in sorted(run.glob("checkpoints/step-*/optimizer.safetensors")):
        for name, tensor in load_file(file).items():
            if name.startswith("matrix") and name.endswith("momentum"):
                wide = tensor if tensor.shape[0] <= tensor.shape[1] else tensor.T
                found.setdefault(f"{wide.shape[0]} × {wide.shape[1]}", []).append(wide.double())
    return {shape: torch.stack(matrices) for shape, matrices in found.items()}


def quality(run: Path) -> Iterator[Result]:
    for shape, matrices in momenta(run).items():
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        polar = u @ vh
        for (kind, steps), number_format in product(SETS, FORMATS):
            found = orthogonalize(matrices.float(), steps, kind, number_format=number_format).double()
            case = f"momenta {shape}, {kind} {steps}, {number_format}"
            lengths = found.norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1))
            yield summarise(case, "cosine to U Vᵀ", "", ((found * polar).sum(dim=(-2, -1)) / lengths).tolist())
            distances = (torch.linalg.svdvals(found) - 1).square().mean(dim=-1).sqrt()
            yield summarise(case, "distance of singular values from 1", "", distances.tolist())


def timed(shape: str, rounds: int) -> list[Result]:
    """Interleaved rounds of one compiled model with every form of the step."""
    metrics = {"optimizer": "ms", "optimizer's share of a step": "share", "training rate": "tokens/s"}
    changes: dict[str, dict[str, object]] = {
        "train": {"backward": "int8", "attention": "blocks"},
        "optim": {"muon_format": "int8"},
    }
    contender = Contender(shape, BATCH[shape], changes, compiled=True)
    (matrices,) = (g.optimizer for g in contender.state.optimizers.groups if isinstance(g.optimizer, muon.Muon))
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in TIMED}
    for turn in range(-1, rounds):
        for name, (kind, steps) in TIMED.items():
            matrices.coefficients, matrices.ns_steps = kind, steps
            with patch.object(muon, "muon_step_int8", (lambda *_, **__: False) if name == BEFORE else muon_step_int8):
                seconds = contender.step()
            share = contender.optimizer_share()
            if turn >= 0:
                runs[name].append((1e3 * seconds * share, share, BATCH[shape] * SEQ_LEN / seconds))
    results = []
    for name, measured in runs.items():
        for index, (metric, unit) in enumerate(metrics.items()):
            values, before = ([run[index] for run in one] for one in (measured, runs[BEFORE]))
            peer, peer_runs = (None, None) if name == BEFORE else (BEFORE, before)
            case, smaller = f"{shape}, {name}", metric != "training rate"
            results.append(
                summarise(case, metric, unit, values, peer=peer, peer_runs=peer_runs, smaller_is_better=smaller)
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with checkpoints of float32 momenta")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=["5.5M", "20M"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = list(quality(arguments.run))
    results += [result for shape in arguments.shapes for result in timed(shape, arguments.rounds)]
    for result in results:
        print(f"{result.case}: {result.metric} {result.value:.4g} {result.unit}", flush=True)
    print(f"wrote {write_results(result_place('optimizer_step', arguments.out), 'optimizer_step', results)}")


if __name__ == "__main__":
    main()
