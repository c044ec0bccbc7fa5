"""Muon's optional parts against their formulas, one matrix and one row at a time."""

import math

import pytest
import torch

from nanochat_cli.config.schema import OptimConfig
from nanochat_cli.optim.muon import Muon, equilibrate_rows, reduce_row_variance
from nanochat_cli.optim.schedules import muon_momentum


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equilibrated_rows_have_one_norm_and_keep_their_direction_and_the_matrix_its_size():
    matrices = random(2, 5, 7) * torch.tensor([1.0, 10, 0.1, 3, 2])[None, :, None]
    result = equilibrate_rows(matrices)
    for before, after in zip(matrices, result, strict=True):
        assert after.norm() == pytest.approx(float(before.norm()), rel=1e-5)
        for row, scaled in zip(before, after, strict=True):
            assert scaled.norm() == pytest.approx(float(before.norm()) / math.sqrt(5), rel=1e-5)
            assert torch.nn.functional.cosine_similarity(row, scaled, dim=0) == pytest.approx(1, abs=1e-6)


def test_row_variance_follows_the_running_mean_square():
    updates = [random(1, 3, 8, seed=seed) for seed in range(3)]
    second = torch.zeros(1, 3, 1)
    running = [0.0] * 3
    for update in updates:
        result = reduce_row_variance(update, second, 0.9)[0]
        rows = []
        for i, row in enumerate(update[0].tolist()):
            running[i] = 0.9 * running[i] + 0.1 * sum(v * v for v in row) / 8
            rows.append([v / math.sqrt(running[i]) for v in row])
        size = math.sqrt(sum(v * v for row in rows for v in row))
        expected = torch.tensor(rows) * (math.sqrt(3) / size)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_variance_belongs_to_the_state_and_survives_its_dictionary():
    parameters = [("w", torch.nn.Parameter(random(4, 6)))]
    muon = Muon(parameters, variance_beta=0.9, equilibrate=True)
    parameters[0][1].grad = random(4, 6, seed=1)
    muon.step(0.1)
    other = Muon([("w", torch.nn.Parameter(random(4, 6)))], variance_beta=0.9)
    other.load_state_dict(muon.state_dict())
    assert sorted(muon.state_dict()["w"]) == ["momentum", "second_moment"]
    for a, b in zip(muon.state_tensors(), other.state_tensors(), strict=True):
        assert torch.equal(a, b)


def test_momentum_rises_linearly_and_stays():
    config = OptimConfig(muon_momentum=0.95, muon_momentum_start=0.85, muon_momentum_warmup=10)
    assert [muon_momentum(step, config) for step in (0, 5, 10, 99)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert muon_momentum(0, OptimConfig(muon_momentum=0.9)) == 0.9
