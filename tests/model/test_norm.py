"""RMSNorm against its definition."""

import pytest
import torch

from nanochat_cli.model.norm import RMSNorm


def definition(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, differentiated by autograd; x [..., D], weight [D]."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + eps)
    return (h * weight).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 4, 16)])
def test_bits_and_gradients_are_those_of_the_definition(shape, dtype):
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5)
    with torch.no_grad():
        norm.weight.normal_()
    x, dy = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
    found, expected = norm(x), definition(x, norm.weight, 1e-5)
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
    """Of the formula itself, in float64."""
    generator = torch.Generator().manual_seed(1)
    x, weight, dy = torch.randn(8, generator=generator), torch.randn(8, generator=generator), torch.randn(8)
    norm = RMSNorm(8, 1e-2)
    with torch.no_grad():
        norm.weight.copy_(weight)

    def objective(x, weight):
        return float((x * weight / (x.square().mean() + 1e-2).sqrt() * dy.double()).sum())

    inputs = x.clone().requires_grad_()
    found = torch.autograd.grad(norm(inputs), (inputs, norm.weight), dy)
    for place, gradient in enumerate(found):
        for index in range(8):
            ends = []
            for sign in (1, -1):
                moved = [x.double().clone(), weight.double().clone()]
                moved[place][index] += sign * 1e-5
                ends.append(objective(*moved))
            assert float(gradient[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-5)
