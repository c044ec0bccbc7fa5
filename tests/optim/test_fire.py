"""FIRE's algorithm against the singular value decomposition, and the reset of optimizer state."""

import math

import pytest
import torch
from torch import Tensor

from nanochat_cli.config.schema import OptimConfig
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.fire import (
    deviation_from_isometry,
    polar_factor,
    reinitialize,
    relative_deviation,
    scale_of,
    spectral_norm,
)
from tests.architectures import build

SHAPES = [(256, 128), (128, 256), (96, 96), (384, 256)]
METHODS = ["newton-schulz", "polar-express"]


def random_matrix(shape: tuple[int, int], condition: float | None = None, seed: int = 0) -> Tensor:
    """float32 [R, C], Gaussian; with a condition, its singular values fall from 1 to 1 / condition geometrically."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if condition is not None:
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u * torch.logspace(0, -math.log10(condition), len(s), dtype=torch.float64) @ v
    return matrix.float()


def by_svd(matrix: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("condition", [None, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_result_is_the_polar_factor_and_an_isometry_to_the_target(shape, condition, method):
    matrix = random_matrix(shape, condition)
    factor = polar_factor(matrix[None], method=method)
    single = factor.matrices.float()
    assert (single[0] - by_svd(matrix)).abs().max() < 1e-4
    gram = (
        single[0].double() @ single[0].double().T if shape[0] < shape[1] else single[0].double().T @ single[0].double()
    )
    assert (gram - torch.eye(min(shape))).square().sum() <= 1e-6
    assert deviation_from_isometry(single).item() <= 1e-6
    assert factor.iterations < 40


def test_a_wide_model_with_an_ill_conditioned_matrix_reaches_the_target():
    # Built from a diagonal and a product of reflections, since decomposing a matrix of this size takes too long.
    size, generator = 1024, torch.Generator().manual_seed(0)
    matrix = torch.diag(torch.logspace(0, -4, size, dtype=torch.float64))
    for _ in range(4):
        left, right = torch.randn(2, size, 1, generator=generator, dtype=torch.float64)
        matrix -= 2 * left @ (left.T @ matrix) / left.square().sum()
        matrix -= 2 * (matrix @ right) @ right.T / right.square().sum()
    _, (change,) = reinitialize(matrix.float()[None], method="polar-express")
    assert change.dfi_after <= 1e-6
    assert change.reached


def test_it_is_deterministic_and_matrices_of_a_stack_do_not_touch_each_other():
    stack = torch.stack(
        [random_matrix((64, 48), None, 1), random_matrix((64, 48), 1e4, 2), random_matrix((64, 48), 10, 3)]
    )
    first, second = polar_factor(stack).matrices, polar_factor(stack).matrices
    assert torch.equal(first, second)
    for one, together in zip(stack, first, strict=True):
        assert (together - by_svd(one)).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES[:4])
def test_the_spectral_norm_is_bounded_from_above_and_closely(shape):
    for seed in range(5):
        matrix = random_matrix(shape, [None, 1.5, 1e4][seed % 3], seed)
        exact = torch.linalg.matrix_norm(matrix.double(), 2)
        bound = spectral_norm(matrix[None])[0]
        assert exact * (1 - 1e-9) <= bound <= exact * min(shape) ** (1 / 128) * (1 + 1e-9)


def test_an_isometry_stays_as_it_is_and_its_multiple_has_no_relative_deviation():
    isometry = by_svd(random_matrix((64, 32)))
    assert polar_factor(isometry[None]).matrices[0] == pytest.approx(isometry.numpy(), abs=1e-6)
    assert deviation_from_isometry(isometry[None]).item() < 1e-20
    assert deviation_from_isometry(2 * isometry[None]).item() == pytest.approx(9 * 32)
    assert abs(relative_deviation(7 * isometry[None]).item()) < 1e-12


def test_a_random_matrix_deviates_as_marchenko_and_pastur_say():
    assert relative_deviation(random_matrix((512, 256))[None]).item() == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize("shape", [(96, 48), (48, 96)])
def test_the_scales_are_those_of_their_names(shape):
    matrix = 0.3 * random_matrix(shape)
    rows, columns = shape
    for kind, expected in (("paper", math.sqrt(rows / columns)), ("fan_in", 1 / math.sqrt(columns))):
        new, _ = reinitialize(matrix[None], scale=kind)
        assert torch.linalg.svdvals(new[0]) == pytest.approx([expected] * 48, rel=1e-3)  # DfI 1e-6 allows 5e-4
    new, _ = reinitialize(matrix[None], scale="preserve_norm")
    assert new.norm().item() == pytest.approx(matrix.norm().item(), rel=1e-4)
    assert scale_of("preserve_norm", matrix[None]).item() == pytest.approx(matrix.norm().item() / math.sqrt(48))


def test_what_changed_is_reported_with_its_definitions():
    matrix = 0.1 * random_matrix((64, 48))
    new, (change,) = reinitialize(matrix[None], scale="preserve_norm")
    s = torch.linalg.svdvals(matrix.double())
    assert change.sfe == pytest.approx((new[0].double() - matrix.double()).square().sum().item())
    assert change.sfe == pytest.approx((s - s.square().mean().sqrt()).square().sum().item(), rel=1e-4)
    assert change.relative_sfe == pytest.approx(change.sfe / matrix.norm().item() ** 2, rel=1e-5)
    assert change.dfi_before == pytest.approx((s.square() - 1).square().sum().item())
    assert change.dfi_after <= 1e-6
    assert change.reached
    assert change.rank == 48


def test_no_isometry_is_closer_than_the_polar_factor():
    matrix = random_matrix((40, 40))
    nearest = (polar_factor(matrix[None]).matrices[0] - matrix).square().sum()
    for seed in range(20):
        other = torch.linalg.qr(matrix.double() + 0.3 * random_matrix((40, 40), seed=100 + seed)).Q
        assert (other - matrix).square().sum() > nearest


def test_lost_directions_and_zeros_end_at_the_bound_and_are_reported():
    matrix = random_matrix((32, 32))
    matrix[:, :3] = 0
    new, (change,) = reinitialize(matrix[None])
    assert new.isfinite().all()
    assert not change.reached
    assert change.dfi_after == pytest.approx(3, abs=1e-3)
    zeros, (change,) = reinitialize(torch.zeros(1, 8, 4), scale="paper")
    assert not zeros.any()
    assert not change.reached


@pytest.mark.parametrize(
    "settings",
    [{"matrix": "muon"}, {"matrix": "muon", "muon_variance_beta": 0.9}, {"matrix": "adamw", "other": "lion"}],
)
def test_a_reset_zeroes_only_the_state_of_the_named_parameters(settings):
    model = build("plain+attention+moe+untied")
    optimizers = build_optimizer(model, OptimConfig(**settings))
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizers.step(0, 10)
    chosen = [f"{name}.weight" for name, _ in model.linears()][1::2]
    before = {
        name: {kind: tensor.clone() for kind, tensor in state.items()}
        for group in optimizers.state_dict().values()
        for name, state in group.items()
    }
    optimizers.reset(set(chosen))
    after = {name: state for group in optimizers.state_dict().values() for name, state in group.items()}
    assert after.keys() == before.keys()
    for name, state in after.items():
        for kind, tensor in state.items():
            assert before[name][kind].any(), (name, kind)
            if name in chosen:
                assert not tensor.any(), (name, kind)
            else:
                assert torch.equal(tensor, before[name][kind]), (name, kind)
