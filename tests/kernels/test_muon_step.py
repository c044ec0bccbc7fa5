"""Muon's whole step in one native call, against the same step in torch and against float64."""

import pytest
import torch

from nanochat_cli.optim import muon
from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.newton_schulz import Coefficients, orthogonalize
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu import native
from nanochat_kernels.muon import muon_step_int8

SHAPES = [(64, 64), (48, 160), (160, 48), (17, 33), (100, 37), (1, 5), (5, 1)]
OPTIONS = [
    {},
    {"coefficients": "cans", "ns_steps": 3, "momentum": 0.3},
    {"coefficients": "polar-express", "weight_decay": 0.1, "nesterov": False},
    {"state_block": 128},
]


@pytest.fixture(autouse=True)
def kernels():
    try:
        native.select("avx512")
    except Unsupported as reason:
        pytest.skip(str(reason))
    yield
    native.select(None)


def stepped(shapes, steps, options, whole=True):
    """Weights, momentum and what the calls returned after some steps; whole: with the native call."""
    generator = torch.Generator().manual_seed(0)
    named = [(f"w{i}", torch.nn.Parameter(0.02 * torch.randn(*s, generator=generator))) for i, s in enumerate(shapes)]
    optimizer = Muon(named, number_format="int8", **options)
    calls = []

    def call(*arguments, **keywords):
        calls.append(whole and muon_step_int8(*arguments, **keywords))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "muon_step_int8", call)
        for _ in range(steps):
            for _, parameter in named:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(0.02)
    return [p.detach() for _, p in named], optimizer.state_tensors(), calls


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_step_in_torch_up_to_the_rounding_of_codes(options):
    for shape in SHAPES:
        weights, state, calls = stepped([shape] * 3, 3, options)
        expected, expected_state, _ = stepped([shape] * 3, 3, options, whole=False)
        before, _, _ = stepped([shape] * 3, 0, options)
        assert calls == [True] * 3
        assert all(torch.equal(a, b) for a, b in zip(state, expected_state, strict=True)), shape
        for new, other, old in zip(weights, expected, before, strict=True):
            assert distance(new - old, other - old) < 0.03, shape


@pytest.mark.parametrize(("kind", "steps"), [("keller-jordan", 5), ("polar-express", 5), ("cans", 3), ("cans", 4)])
def test_the_update_is_as_close_to_float64_as_that_of_the_reference(kind, steps):
    generator = torch.Generator().manual_seed(1)
    for shape in [(128, 128), (96, 256), (256, 96)]:
        falling = torch.logspace(0, -1, shape[1])  # singular values of a momentum fall too
        gradient = torch.randn(3, *shape, generator=generator) * falling
        weights, momenta = torch.zeros(3, *shape), torch.zeros(3, *shape)
        assert step_of(gradient, momenta, weights, kind, steps)
        exact = orthogonalize(gradient.double(), steps, kind)
        reference = orthogonalize(gradient, steps, kind, number_format="int8")
        assert distance(weights.double(), exact) < min(0.05, 1.2 * distance(reference.double(), exact)), shape
        assert torch.equal(momenta, gradient)


def step_of(gradient, momenta, weights, kind: Coefficients = "keller-jordan", steps=5):
    """One step without momentum at the rate 1, so that the weights become the orthogonalised gradient."""
    triples = muon.coefficients(kind, steps)
    limit, tighten = muon.divisor(kind), muon.tightens(kind)
    options = {"momentum": 0.0, "nesterov": False, "limit": limit, "tighten": tighten, "decay": 1.0, "rate": 1.0}
    return muon_step_int8(list(gradient), momenta, list(weights), triples, **options)


def test_the_bits_do_not_depend_on_the_number_of_threads():
    """3 matrices are shared out among 1 or 3 threads; 2 threads share the rows of each."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            native.library().nk_set_threads(threads)
            results.append([t for shape in ((160, 96), (70, 130)) for t in stepped([shape] * 3, 2, {})[0]])
    finally:
        native.library().nk_set_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_codes_of_the_largest_magnitude_are_multiplied_exactly():
    """Rank one: every code is ± 127, where instructions that saturate would be far off."""
    signs = torch.randn(1, 64, 1, generator=torch.Generator().manual_seed(2)).sign() * torch.ones(1, 1, 192)
    weights = torch.zeros(1, 64, 192)
    assert step_of(signs, torch.zeros(1, 64, 192), weights)
    assert distance(weights, orthogonalize(signs)) < 0.01


def test_what_it_cannot_do_is_refused_with_nothing_changed(monkeypatch):
    gradient, momenta, weights = torch.randn(1, 8, 16), torch.zeros(1, 8, 16), torch.zeros(1, 8, 16)
    assert not step_of(gradient.mT.contiguous().mT, momenta, weights)
    assert not step_of(gradient.double(), momenta, weights)
    native.select("avx2")
    assert not step_of(gradient, momenta, weights)
    native.select("avx512")
    monkeypatch.setenv("NANOCHAT_BACKEND", "reference")
    assert not step_of(gradient, momenta, weights)
    assert not torch.cat((momenta, weights)).any()


def test_settings_that_need_the_whole_update_are_left_to_torch():
    for options in ({"cautious": True, "weight_decay": 0.1}, {"equilibrate": True}, {"variance_beta": 0.9}):
        assert stepped([(16, 32)] * 2, 1, options)[2] == []
