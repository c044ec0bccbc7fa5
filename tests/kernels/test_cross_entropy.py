"""The fused cross-entropy against torch's in float64, and what its codes keep of the gradient."""

import pytest
import torch
from torch.nn import functional as F

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu import native
from nanochat_kernels.operations import cross_entropy_codes, cross_entropy_gradient

SHAPES = [(1, 1), (1, 2), (3, 31), (9, 32), (17, 1000), (40, 4097)]
SETS = ["portable", "avx2", "avx512"]


def problem(m: int, n: int, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [m, n], targets with every third ignored, and factors, 0 for those."""
    generator = torch.Generator().manual_seed(m * n)
    logits = torch.randn(m, n, generator=generator) * spread
    targets = torch.randint(0, n, (m,), generator=generator)
    targets[2::3] = -100
    return logits, targets, torch.rand(m, generator=generator) * (targets >= 0)


def oracle(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's own loss and gradient, float64."""
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), gradient


def select(name: str) -> None:
    try:
        native.select(name)
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=SETS)
def kernel_set(request):
    select(request.param)
    yield
    native.select(None)


@pytest.mark.parametrize("spread", [1e-3, 3.0, 40.0])
@pytest.mark.usefixtures("kernel_set")
def test_every_set_of_kernels_has_the_loss_and_gradient_of_torch(spread):
    for m, n in SHAPES:
        logits, targets, factor = problem(m, n, spread)
        loss, gradient = oracle(logits, targets)
        for backend in ("cpu", "reference"):
            found, in_place = cross_entropy_gradient(logits.clone(), targets, factor, backend=backend)
            torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6 * spread)
            assert ((in_place - gradient * factor.unsqueeze(1)).abs() <= 1e-6 * factor.unsqueeze(1)).all(), (m, n)


def test_logits_in_bf16_become_the_gradient_rounded_once():
    logits, targets, factor = problem(9, 300)
    logits = logits.to(torch.bfloat16)
    loss, gradient = oracle(logits, targets)
    found, in_place = cross_entropy_gradient(logits, targets, factor, backend="reference")
    assert in_place is logits
    torch.testing.assert_close(found.double(), loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(in_place.double(), gradient * factor.unsqueeze(1), rtol=1.001 * 2**-8, atol=1e-9)


def test_all_sets_of_kernels_and_numbers_of_threads_have_the_same_bits():
    logits, targets, factor = problem(40, 4097)
    found = []
    try:
        for name in SETS:
            native.select(name)
            for threads in (1, 3):
                native.library().nk_set_threads(threads)
                loss, gradient = cross_entropy_gradient(logits.clone(), targets, factor, backend="cpu")
                found.append((loss, gradient, *cross_entropy_codes(logits.clone(), targets, factor, backend="cpu")))
    except Unsupported:
        assert found, "at least the portable ones run"
    finally:
        native.select(None)
        native.library().nk_set_threads(torch.get_num_threads())
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("levels", [127.0, 63.0])
@pytest.mark.usefixtures("kernel_set")
def test_a_code_is_off_by_less_than_a_step(levels):
    for m, n in SHAPES:
        logits, targets, factor = problem(m, n)
        softmax = logits.double().softmax(dim=1) * factor.unsqueeze(1)
        for backend in ("cpu", "reference"):
            loss, codes, scale = cross_entropy_codes(logits.clone(), targets, factor, levels, backend=backend)
            assert ((codes * scale.double().unsqueeze(1) - softmax).abs() <= 1.0001 * scale.unsqueeze(1)).all()
            assert codes.min() >= 0
            assert codes.max() <= levels
            torch.testing.assert_close(loss.double(), oracle(logits, targets)[0], rtol=1e-6, atol=3e-6)


def test_the_codes_are_those_of_the_reference_but_for_last_digits_of_exp():
    logits, targets, factor = problem(40, 4097)
    found, wanted = (
        cross_entropy_codes(logits.clone(), targets, factor, 127.0, 7, backend=backend)
        for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-6, atol=0)
    difference = found.codes.int() - wanted.codes.int()
    assert int(difference.abs().max()) <= 1
    assert float((difference != 0).double().mean()) < 1e-4


def test_the_mean_of_codes_along_rows_and_along_columns_has_no_error():
    """10⁴ draws of one probability: random rounding would be off by ½ / √10⁴ of a step, an even dither by ~1 / 10⁴."""
    draws = 10**4
    generator = torch.Generator().manual_seed(5)
    row = torch.randn(64, generator=generator) * 2
    codes, targets = row.softmax(0) / row.softmax(0).max() * 127, torch.zeros(draws, dtype=torch.int64)
    by_row = cross_entropy_codes(row.repeat(draws, 1), targets, torch.ones(draws)).codes.double().mean(dim=0)
    assert float((by_row - codes).abs().max()) < 1e-3
    logits = torch.full((8, draws), -6.3)
    logits[:, 0] = 0
    by_column = cross_entropy_codes(logits, targets[:8], torch.ones(8)).codes[:, 1:].double().mean(dim=1)
    assert float((by_column - 127 * torch.tensor(-6.3).exp().double()).abs().max()) < 1e-3


def test_small_probabilities_that_no_code_could_hold_keep_their_sum():
    """0.9 for one token and a tenth for four thousand others: to the nearest step, all of these would be nothing."""
    logits = torch.zeros(1, 4096)
    logits[0, 17] = torch.tensor(9.0 * 4095).log()
    _, codes, scale = cross_entropy_codes(logits, torch.tensor([3]), torch.ones(1))
    others = codes[0].int().sum() - codes[0, 17]
    assert float(others * scale) == pytest.approx(0.1, rel=0.05)
    assert float(codes[0, 17] * scale) == pytest.approx(0.9, rel=1e-5)


def test_where_a_row_begins_its_place_among_all_rows_decides():
    logits, targets, factor = problem(30, 100)
    whole = cross_entropy_codes(logits.clone(), targets, factor)
    parts = [
        cross_entropy_codes(logits[a:b].clone(), targets[a:b], factor[a:b], 127.0, a) for a, b in ((0, 13), (13, 30))
    ]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts]))
    assert not torch.equal(whole.codes[13:], cross_entropy_codes(logits[13:].clone(), targets[13:], factor[13:]).codes)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ignored_rows_have_no_loss_and_no_gradient(backend):
    logits, targets, factor = problem(9, 50)
    loss, gradient = cross_entropy_gradient(logits.clone(), targets, factor, backend=backend)
    coded = cross_entropy_codes(logits.clone(), targets, factor, backend=backend)
    for found in (loss, gradient, *coded):
        assert not found[2::3].any()
        assert found[::3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 5, 40, 63])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.usefixtures("kernel_set")
def test_what_is_not_finite_reaches_loss_and_gradient_of_its_row_alone(bad, column, backend):
    logits, targets, factor = problem(10, 64)
    logits[4, column] = bad
    loss, gradient = cross_entropy_gradient(logits.clone(), targets, factor, backend=backend)
    coded = cross_entropy_codes(logits.clone(), targets, factor, backend=backend)
    for found in (loss, gradient.sum(dim=1), coded.loss, coded.scale):
        assert not found[4].isfinite()
        assert torch.cat([found[:4], found[5:]]).isfinite().all()


@pytest.mark.usefixtures("kernel_set")
def test_a_logit_of_minus_infinity_is_a_token_without_probability():
    logits, targets, factor = problem(6, 70)
    logits[:, 1::2], targets[targets >= 0] = -float("inf"), 0
    loss, gradient = cross_entropy_gradient(logits.clone(), targets, factor, backend="cpu")
    codes = cross_entropy_codes(logits.clone(), targets, factor, backend="cpu").codes
    assert not gradient[:, 1::2].any()
    assert not codes[:, 1::2].any()
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-6, atol=1e-6)


def test_a_target_outside_of_the_vocabulary_is_an_error_not_a_read_of_other_memory():
    with pytest.raises(IndexError, match="target 5 of 5 logits"):
        cross_entropy_gradient(torch.zeros(1, 5), torch.tensor([5]), torch.ones(1), backend="cpu")
