"""Mixing of residual streams: values and every gradient equal the reference's, which autograd differentiates."""

import pytest
import torch

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference import hyper_connections as reference
from nanochat_kernels.triton_kernels import hyper_connections

FORMS = ["read", "write"]
# A row of weights sums over at most five products of float32, a gradient of weights over 600: rounding only.
TOLERANCE = 2e-5


def operands(
    n: int, width: int, form: str, *, per_token: bool, dtype: torch.dtype = torch.float32
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    generator = torch.Generator().manual_seed(n + width)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, y = draw(2, 3, n, width), draw(2, 3, width).to(dtype) if form == "write" else None
    leading = (2, 3) if per_token else ()
    weights = draw(*leading, 1, n) if y is None else draw(*leading, n, n + 1)
    return [None if t is None else t.requires_grad_() for t in (x, weights, y)], draw(2, 3, weights.shape[-2], width)


def values_and_gradients(module, arguments, grad):
    out = module.mix_streams(*arguments)
    return [out, *torch.autograd.grad(out, [t for t in arguments if t is not None], grad)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("width", "per_token"), [(600, True), (100, False), (1, True)])
def test_values_and_gradients_equal_the_reference(form, n, width, per_token):
    arguments, grad = operands(n, width, form, per_token=per_token)
    found = values_and_gradients(hyper_connections, arguments, grad)
    expected = values_and_gradients(reference, arguments, grad)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_half_precision_output_of_the_sublayer_gets_a_gradient_of_its_type():
    arguments, grad = operands(2, 64, "write", per_token=True, dtype=torch.bfloat16)
    found = values_and_gradients(hyper_connections, arguments, grad)
    expected = values_and_gradients(reference, arguments, grad)
    torch.testing.assert_close(found[0], expected[0], rtol=TOLERANCE, atol=TOLERANCE)
    assert found[3].dtype == torch.bfloat16
    torch.testing.assert_close(found[3], expected[3], rtol=8e-3, atol=8e-3)  # one unit of bfloat16


def test_streams_that_are_one_expanded_tensor_are_taken():
    x = torch.randn(2, 3, 1, 32).expand(2, 3, 4, 32)
    weights = torch.rand(1, 4)
    torch.testing.assert_close(hyper_connections.mix_streams(x, weights), reference.mix_streams(x, weights))


def test_other_stream_counts_and_types_are_unsupported():
    with pytest.raises(Unsupported, match="of 3 streams"):
        hyper_connections.mix_streams(torch.zeros(1, 1, 3, 8), torch.zeros(1, 3))
    with pytest.raises(Unsupported, match="bfloat16"):
        hyper_connections.mix_streams(torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16), torch.zeros(1, 2))
