"""The ternary linear operation against autograd on the straight-through formula."""

import torch

from nanochat_kernels import fake_ternarize, ternary_linear


def test_forward_and_gradients_equal_the_straight_through_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 64, generator=generator, requires_grad=True)
    latent = torch.randn(32, 64, generator=generator, requires_grad=True)
    dy = torch.randn(3, 5, 32, generator=generator)
    effective = fake_ternarize(latent)

    expected = torch.nn.functional.linear(x, latent + (effective - latent).detach())
    expected_grads = torch.autograd.grad(expected, (x, latent), dy)
    y = ternary_linear(x, latent, effective)
    grads = torch.autograd.grad(y, (x, latent), dy)

    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_under_bfloat16_autocast_the_output_is_bfloat16_and_the_latent_gradient_float32():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    latent = torch.randn(32, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ternary_linear(x, latent, fake_ternarize(latent))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert latent.grad is not None
    assert latent.grad.dtype == torch.float32
