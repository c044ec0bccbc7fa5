"""Muon against torch.optim.Muon; Newton-Schulz against the singular value decomposition."""

import math

import pytest
import torch

from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.newton_schulz import orthogonalize

SHAPES = [(32, 32), (64, 32), (32, 96), (32, 32)]


def named(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.nn.Parameter(torch.randn(*shape, generator=generator))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_five_steps_equal_torch_optim_muon_on_the_same_gradients(nesterov, weight_decay):
    ours, theirs = named(SHAPES, 0), named(SHAPES, 0)
    # torch iterates in bfloat16; in the same dtype the two may differ only by the order of bfloat16 roundings.
    muon = Muon(ours, nesterov=nesterov, weight_decay=weight_decay, number_format="bf16")
    reference = torch.optim.Muon(
        [p for _, p in theirs], lr=0.02, momentum=0.95, nesterov=nesterov, weight_decay=weight_decay, ns_steps=5
    )
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for (_, a), (_, b) in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        muon.step(0.02)
        reference.step()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        # an update has entries of about 0.02 / sqrt(32); bfloat16 keeps 8 bits of it
        torch.testing.assert_close(a, b, rtol=0, atol=5 * 0.02 * 2**-7)
        assert (a - b).abs().mean() < 5 * 0.02 / 32**0.5 * 2**-6


def test_float32_iteration_stays_within_bfloat16_error_of_torch():
    ours, theirs = named(SHAPES, 2), named(SHAPES, 2)
    muon, reference = Muon(ours), torch.optim.Muon([p for _, p in theirs], lr=0.02, weight_decay=0.0)
    generator = torch.Generator().manual_seed(3)
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        a.grad = torch.randn(a.shape, generator=generator)
        b.grad = a.grad.clone()
    muon.step(0.02)
    reference.step()
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.02 * 2**-5)


@pytest.mark.parametrize("kind", ["keller-jordan", "polar-express"])
@pytest.mark.parametrize("shape", [(2, 48, 48), (2, 96, 32), (2, 32, 96)])
def test_singular_values_come_near_one_and_singular_vectors_stay(kind, shape):
    matrices = torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    result = orthogonalize(matrices, 5, kind)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    aligned = u.mT @ result @ vh.mT
    values = torch.diagonal(aligned, dim1=-2, dim2=-1)
    off = aligned - torch.diag_embed(values)
    assert off.abs().max() < 1e-6
    strong = s > 0.05 * s.amax(dim=-1, keepdim=True)
    assert ((values > 0.6) & (values < 1.3))[strong].all()


@pytest.mark.parametrize(("steps", "bound", "least"), [(3, 0.015, 0.83), (4, 0.005, 0.9)])
@pytest.mark.parametrize("shape", [(48, 48), (96, 32), (32, 96)])
def test_few_iterations_of_cans_bring_all_values_above_their_bound_near_one(steps, bound, least, shape):
    generator = torch.Generator().manual_seed(9)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator, dtype=torch.float64), full_matrices=False)
    spectrum = torch.logspace(0, math.log10(bound), min(shape), dtype=torch.float64)
    above = spectrum / (spectrum**4).sum() ** 0.25 >= 1.01 * bound  # after the scaling, and with the safety factor
    found = orthogonalize((u * spectrum @ vh).unsqueeze(0), steps, "cans")[0]
    values = torch.diagonal(u.mT @ found @ vh.mT)
    assert above.sum() > min(shape) // 2
    assert ((values > least) & (values < 2 - least))[above].all()
    assert (found - u * values @ vh).abs().max() < 1e-6


@pytest.mark.parametrize("number_format", ["fp32", "bf16", "int8"])
def test_cans_is_stable_where_its_scaling_is_exact(number_format):
    """A matrix of rank one, whose first polynomial is steep at 1: rounding must not carry it out of the next one."""
    generator = torch.Generator().manual_seed(10)
    matrix = torch.randn(1, 64, 1, generator=generator) * torch.randn(1, 1, 96, generator=generator)
    for steps in (3, 4, 5):
        largest = torch.linalg.svdvals(orthogonalize(matrix, steps, "cans", number_format=number_format).float()).max()
        assert 0.8 < largest < 1.2


def test_the_result_does_not_depend_on_which_matrices_share_a_stack():
    together = named([(32, 64)] * 3, 5)
    alone = named([(32, 64)] * 3, 5)
    gradients = [torch.randn(32, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for (_, p), (_, q), g in zip(together, alone, gradients, strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    Muon(together).step(0.02)
    for name, parameter in alone:
        Muon([(name, parameter)]).step(0.02)
    for (_, p), (_, q) in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_cautious_decay_leaves_entries_whose_update_opposes_their_sign():
    (name, parameter), *_ = named([(8, 8)], 6)
    before = parameter.detach().clone()
    parameter.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(7))
    plain = torch.nn.Parameter(before.clone())
    plain.grad = parameter.grad.clone()
    Muon([(name, parameter)], weight_decay=0.5, cautious=True).step(0.1)
    Muon([(name, plain)]).step(0.1)
    update = before - plain.detach()
    decayed = (before * update) > 0
    torch.testing.assert_close(parameter.detach()[~decayed], plain.detach()[~decayed])
    torch.testing.assert_close(parameter.detach()[decayed], (plain.detach() - 0.05 * before)[decayed])


def test_state_survives_its_dictionary():
    first, second = named(SHAPES, 8), named(SHAPES, 8)
    one, other = Muon(first), Muon(second)
    for _, p in first:
        p.grad = torch.ones_like(p)
    one.step(0.02)
    other.load_state_dict(one.state_dict())
    for a, b in zip(one.state_tensors(), other.state_tensors(), strict=True):
        assert torch.equal(a, b)


def test_vectors_are_refused_by_name():
    with pytest.raises(ValueError, match="bias"):
        Muon([("bias", torch.nn.Parameter(torch.zeros(3)))])
