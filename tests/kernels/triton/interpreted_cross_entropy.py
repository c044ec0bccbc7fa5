"""The loss of rows of logits, and the gradient in their place, against torch's in float64."""

import pytest
import torch
from torch.nn import functional as F

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.triton_kernels import cross_entropy
from nanochat_kernels.triton_kernels.operations import cross_entropy_gradient

# The sum of a few thousand exponentials in float32, of which each has an error of two units in the last place.
ROUNDING = 1e-6
# The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place.
STEP = {torch.float32: 0.0, torch.bfloat16: 2**-7}
INFINITY = float("inf")


def problem(rows: int, vocabulary: int, spread: float = 3.0, dtype: torch.dtype = torch.float32):
    """Logits, targets with every third ignored, and factors that are not zero even there."""
    generator = torch.Generator().manual_seed(rows * vocabulary)
    logits = (torch.randn(rows, vocabulary, generator=generator) * spread).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    targets[2::3] = -100
    return logits, targets, torch.rand(rows, generator=generator) + 0.1


def assert_right(logits: torch.Tensor, targets: torch.Tensor, factor: torch.Tensor) -> None:
    """Consumes logits."""
    leaf = logits.double().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * factor.double()).sum(), leaf)
    loss, found = cross_entropy_gradient(logits, targets, factor)
    assert found is logits
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=ROUNDING, atol=ROUNDING)
    bound = ROUNDING * factor.unsqueeze(1) + STEP[logits.dtype] * gradient.abs()
    assert ((found.double() - gradient).abs() <= bound).all()


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("spread", [1e-3, 3.0, 40.0])
def test_loss_and_gradient_are_those_of_torch_for_any_number_of_rows_and_logits(dtype, spread):
    for rows, vocabulary in ((1, 1), (1, 2), (3, 31), (40, 300), (2, 8192), (2, 8193), (3, 20000)):
        assert_right(*problem(rows, vocabulary, spread, dtype))


@pytest.mark.parametrize("dtype", STEP)
def test_extreme_logits_lose_nothing(dtype):
    """At ±10⁴ the exponentials of float32 overflow and vanish; the maximum comes from the first block, or the last."""
    logits, targets, factor = problem(8, 20000, 1e4, dtype)
    logits[0], logits[1] = 1e4, -1e4
    logits[3, 0], logits[4, -1] = 3e38, 3e38
    assert_right(logits, targets, factor)


def test_a_factor_may_be_one_number_for_all_rows():
    logits, targets, _ = problem(9, 50)
    assert_right(logits, targets, torch.tensor(0.125).expand(9))


@pytest.mark.parametrize("dtype", STEP)
def test_ignored_rows_have_no_loss_and_a_gradient_of_zero_whatever_their_logits(dtype):
    logits, targets, factor = problem(9, 50, dtype=dtype)
    logits[5, 7] = float("nan")
    loss, gradient = cross_entropy_gradient(logits, targets, factor)
    assert not loss[2::3].any()
    assert not gradient[2::3].any()
    assert loss[::3].all()
    assert gradient[::3].all()


def test_what_lies_beside_the_logits_of_a_row_is_not_touched():
    logits, targets, factor = problem(6, 300)
    wide = torch.full((6, 512), 7.0)
    wide[:, :300] = logits
    assert_right(wide[:, :300], targets, factor)
    assert torch.equal(wide[:, 300:], torch.full((6, 212), 7.0))


def test_a_logit_of_minus_infinity_is_a_token_without_probability_also_through_all_of_the_first_block():
    logits, targets, factor = problem(6, cross_entropy.MAX_BLOCK + 100)
    logits[:, : cross_entropy.MAX_BLOCK], targets[targets >= 0] = -INFINITY, cross_entropy.MAX_BLOCK + 3
    assert_right(logits, targets, factor)


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
@pytest.mark.parametrize("column", [0, 63, 8200])
def test_what_is_not_finite_reaches_loss_and_gradient_of_its_row_alone(bad, column):
    logits, targets, factor = problem(4, 8300)
    logits[1, column] = bad
    loss, gradient = cross_entropy_gradient(logits, targets, factor)
    for found in (loss, gradient.sum(dim=1)):
        assert found.isfinite().tolist() == [True, False, True, True]


def test_a_target_outside_of_the_vocabulary_has_a_loss_that_is_not_a_number():
    loss, _ = cross_entropy_gradient(torch.zeros(2, 5), torch.tensor([5, 4]), torch.ones(2))
    assert loss.isfinite().tolist() == [False, True]


def test_other_types_and_layouts_are_unsupported():
    logits, targets, factor = problem(4, 4)
    for wrong in ((logits.half(), targets), (logits, targets.int()), (logits.T, targets)):
        with pytest.raises(Unsupported, match="logits of"):
            cross_entropy_gradient(*wrong, factor)
