"""GaLore against Muon and AdamW if the subspace is everything, and against its formula if it is not."""

import pytest
import torch

from nanochat_cli.config.sections.optim import GaLoreConfig
from nanochat_cli.optim.adamw import AdamW
from nanochat_cli.optim.galore import GaLore
from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.subspace import leading_basis, seeded

SHAPES = [(24, 40), (24, 40), (40, 24), (24, 24)]


def parameters(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.nn.Parameter(torch.randn(*shape, generator=generator))) for i, shape in enumerate(shapes)]


def low_rank(shape, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(side, rank, generator=generator) for side in shape)
    return left @ right.T


def config(**options):
    return GaLoreConfig.model_validate({"rank": 6, "update_freq": 3, "enabled": True} | options)


def give(pairs, steps_seed, rank=None):
    for i, (_, parameter) in enumerate(pairs):
        seed = 100 * steps_seed + i
        shape = tuple(parameter.shape)
        parameter.grad = low_rank(shape, rank or min(shape), seed)


def differences(a, b):
    return [float((p - q).detach().norm() / q.detach().norm()) for (_, p), (_, q) in zip(a, b, strict=True)]


@pytest.mark.parametrize("shape", [(3, 20, 50), (1, 20, 20)])
def test_the_basis_spans_the_leading_singular_vectors(shape):
    generator = torch.Generator().manual_seed(1)
    u, _, vh = torch.linalg.svd(torch.randn(*shape, generator=generator), full_matrices=False)
    values = 0.5 ** torch.arange(shape[1]).float()
    matrices = u * values @ vh
    basis = leading_basis(matrices, 4, oversampling=8, power_iterations=1, generator=seeded(7))
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(shape[0], 4, 4), atol=1e-5, rtol=0)
    overlap = u[..., :4].mT @ basis
    # vectors come in order, each up to its sign
    torch.testing.assert_close(overlap.abs(), torch.eye(4).expand(shape[0], 4, 4), atol=2e-3, rtol=0)


def test_the_basis_does_not_depend_on_the_neighbours_and_survives_a_gradient_of_zero():
    matrices = torch.randn(3, 12, 30, generator=torch.Generator().manual_seed(2))
    matrices[1] = 0
    options = {"oversampling": 4, "power_iterations": 1}
    together = leading_basis(matrices, 5, **options, generator=seeded(3))
    assert together.isfinite().all()
    alone = leading_basis(matrices[2:], 5, **options, generator=seeded(3))
    torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=0)


def test_a_rank_of_the_whole_matrix_is_muon():
    ours, theirs = parameters(), parameters()
    galore, muon = GaLore(ours, config(rank=24, scale=0.25)), Muon(theirs)
    for step in range(4):
        give(ours, step)
        give(theirs, step)
        galore.step(0.02)
        muon.step(0.02)
    assert max(differences(ours, theirs)) < 1e-6


def test_gradients_inside_the_subspace_are_stepped_as_muon_does_whatever_its_rotation():
    """The gradients of all steps lie in one space of rank 6: P NS(Pᵀ m) = NS(m), also across new subspaces.

    So α is 1 with Muon when nobody sets it; GaLore's own 0.25 is of Adam, whose steps inside a subspace are longer.
    """
    ours, theirs = parameters(), parameters()
    galore, muon = GaLore(ours, config()), Muon(theirs)
    for step in range(5):
        for i, ((_, p), (_, q)) in enumerate(zip(ours, theirs, strict=True)):
            short, long = sorted(p.shape)
            basis = torch.linalg.qr(low_rank((short, 6), 6, i)).Q
            gradient = basis @ low_rank((6, long), 6, 50 + 10 * step + i)
            p.grad = gradient if p.shape[0] == short else gradient.T.contiguous()
            q.grad = p.grad.clone()
        galore.step(0.02)
        muon.step(0.02)
    # Newton-Schulz amplifies rounding of the directions that are zero in exact arithmetic; they have norm 1e-7
    assert max(differences(ours, theirs)) < 1e-3


def test_state_has_the_size_of_the_rank_and_nothing_has_that_of_the_matrix():
    galore = GaLore(parameters(), config())
    elements = [2 * (24 * 6 + 6 * 40), 24 * 6 + 6 * 40, 24 * 6 + 6 * 24]
    assert sum(t.numel() for t in galore.state_tensors()) == sum(elements)
    adamw = GaLore(parameters(), config(), inner="adamw")
    assert sum(t.numel() for t in adamw.state_tensors()) == sum(elements) + 6 * (2 * 40 + 40 + 24)


def test_an_explicit_scale_multiplies_the_step_of_muon_too():
    ours, theirs = parameters(), parameters()
    for pairs, scale in ((ours, 0.5), (theirs, None)):
        give(pairs, 0)
        GaLore(pairs, config(scale=scale)).step(0.02)
    for (_, p), (_, q), (_, w) in zip(ours, theirs, parameters(), strict=True):
        torch.testing.assert_close(2 * (p - w).detach(), (q - w).detach(), atol=1e-5, rtol=0)


def test_the_update_is_the_formula_between_new_subspaces():
    (pair,) = parameters([(24, 40)])
    galore = GaLore([pair], config(), inner="adamw", betas=(0.9, 0.99), eps=1e-8)
    weight, mean, square = pair[1].detach().clone(), 0.0, 0.0
    for step in range(3):
        give([pair], step)
        gradient = pair[1].grad.clone()
        galore.step(0.01)
        p = galore.state_dict()["w0"]["projection"]
        low = p.T @ gradient
        mean, square = 0.9 * mean + 0.1 * low, 0.99 * square + 0.01 * low**2
        unbiased_mean, unbiased_square = mean / (1 - 0.9 ** (step + 1)), square / (1 - 0.99 ** (step + 1))
        weight -= 0.01 * 0.25 * p @ (unbiased_mean / (unbiased_square.sqrt() + 1e-8))
    torch.testing.assert_close(pair[1].detach(), weight, atol=1e-5, rtol=0)


def test_adamw_without_projection_is_adamw():
    ours, theirs = parameters(), parameters()
    galore = GaLore(ours, config(rank=24), inner="adamw", betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    adamw = AdamW(theirs, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    for step in range(3):
        give(ours, step)
        give(theirs, step)
        galore.step(0.01)
        adamw.step(0.01)
    assert max(differences(ours, theirs)) < 1e-6


def test_momentum_moves_into_a_new_subspace():
    (pair,) = parameters([(24, 40)])
    galore = GaLore([pair], config(update_freq=2), momentum=0.9)
    for step in range(2):
        give([pair], step)
        galore.step(0.02)
    old = {k: v.clone() for k, v in galore.state_dict()["w0"].items()}
    give([pair], 2)
    gradient = pair[1].grad.clone()
    galore.step(0.02)
    new = galore.state_dict()["w0"]
    assert not torch.equal(new["projection"], old["projection"])
    moved = new["projection"].T @ (old["projection"] @ old["momentum"])
    expected = 0.9 * moved + 0.1 * new["projection"].T @ gradient
    torch.testing.assert_close(new["momentum"], expected, atol=1e-5, rtol=1e-4)


def test_stacked_experts_are_projected_one_by_one():
    stacked = torch.randn(3 * 24, 40, generator=torch.Generator().manual_seed(5))
    together = ("experts", torch.nn.Parameter(stacked.clone()))
    alone = [(f"e{i}", torch.nn.Parameter(part.clone())) for i, part in enumerate(stacked.split(24))]
    one, three = GaLore([together], config(), matrices={"experts": 3}), GaLore(alone, config())
    for step in range(4):
        give(alone, step)
        together[1].grad = torch.cat([p.grad for _, p in alone])
        one.step(0.02)
        three.step(0.02)
    torch.testing.assert_close(together[1].detach(), torch.cat([p.detach() for _, p in alone]), atol=1e-4, rtol=0)


def test_a_sampled_estimate_of_the_gradient_is_unbiased():
    """Over many periods, the mean of what the two kinds of step receive is the gradient."""
    gradient = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(6))
    galore = GaLore(parameters([(12, 20)] * 3), config(unbiased=True, full_rank_share=0.3))
    stack = galore.stacks[0]
    projection = leading_basis(gradient, 6, oversampling=4, power_iterations=1, generator=seeded(1))
    periods = 4000
    complement = galore._inside("complement", gradient.clone(), projection)
    projected = projection @ galore._inside("projected", gradient.clone(), projection)
    drawn = torch.zeros(3)
    for period in range(periods):
        for i in galore._draw(stack, period):
            drawn[i] += 1
    share = drawn / periods
    assert (share - 0.3).abs().max() < 4 * (0.3 * 0.7 / periods) ** 0.5  # four standard deviations
    mean = 0.3 * complement + 0.7 * projected
    torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=0)


def test_sampled_parameters_step_outside_the_subspace_and_the_others_inside():
    pairs = parameters([(12, 20)] * 4)
    galore = GaLore(pairs, config(unbiased=True, full_rank_share=0.5))
    before = [p.detach().clone() for _, p in pairs]
    give(pairs, 0)
    galore.step(0.02)
    state = galore.state_dict()
    full = 0
    for (name, p), old in zip(pairs, before, strict=True):
        change, basis = p.detach() - old, state[name]["projection"]
        inside = basis @ (basis.T @ change)
        if state[name]["momentum"].shape == (12, 20):
            full += 1
            assert inside.norm() < 2e-3 * change.norm()  # Newton-Schulz amplifies what rounding left
        else:
            assert (change - inside).norm() < 1e-4 * change.norm()
    assert full == 2


OPTIONS = [
    {},
    {"state_block": 128},
    {"inner": "adamw", "state_block": 128},
    {"unbiased": True, "state_block": 128},
    {"unbiased": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("before", [2, 3, 4])
def test_restored_state_continues_bit_for_bit_before_in_and_after_a_new_subspace(options, before):
    options = dict(options)
    made = config(unbiased=options.pop("unbiased", False), full_rank_share=0.5)
    ours = parameters()
    galore = GaLore(ours, made, **options)
    for step in range(before):
        give(ours, step)
        galore.step(0.02)
    twin = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in ours]
    restored = GaLore(twin, made, **options)
    restored.load_state_dict({k: {n: t.clone() for n, t in v.items()} for k, v in galore.state_dict().items()})
    for step in range(before, before + 4):
        for pairs, optimizer in ((ours, galore), (twin, restored)):
            give(pairs, step)
            optimizer.step(0.02)
    for (_, a), (_, b) in zip(ours, twin, strict=True):
        assert torch.equal(a, b)


def test_released_gradients_give_the_same_steps_and_are_gone_after_the_backward_pass():
    ours, theirs = parameters(), parameters()
    released, kept = GaLore(ours, config(release_gradients=True)), GaLore(theirs, config())
    generator = torch.Generator().manual_seed(8)
    for _ in range(5):
        micro_batches = [[torch.randn(p.shape, generator=generator) for _, p in ours] for _ in range(2)]
        micro_batches[1] = [0.1 * g for g in micro_batches[0]]  # a sum whose subspace is that of its first part
        for pairs in (ours, theirs):
            for gradients in micro_batches:
                sum((p * g).sum() for (_, p), g in zip(pairs, gradients, strict=True)).backward()
        assert all(p.grad is None for _, p in ours)
        released.step(0.02)
        kept.step(0.02)
        released.zero_grad()
        for _, p in theirs:
            p.grad = None
    assert max(differences(ours, theirs)) < 1e-4
