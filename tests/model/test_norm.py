"""RMSNorm against its definition."""

import pytest
import torch

from nanochat_cli.model.norm import RMSNorm, rms_norm_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 4, 16)])
def test_bits_and_gradients_are_those_of_the_definition(shape, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    found, expected = norm(x), rms_norm_reference(x, norm.weight, 1e-5)
    assert torch.equal(found, expected)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(
        torch.autograd.grad(found, (x, norm.weight), dy),
        torch.autograd.grad(expected, (x, norm.weight), dy),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_finite_differences():
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    norm = RMSNorm(8, 1e-2).double()
    reference = torch.autograd.grad(rms_norm_reference(x, norm.weight, 1e-2).sin().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(norm(x).sin().sum(), x)[0], reference, rtol=1e-5, atol=1e-6)
