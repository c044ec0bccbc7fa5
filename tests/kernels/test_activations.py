"""Activation quantisation against integer arithmetic in numpy."""

import numpy as np
import pytest
import torch

from nanochat_kernels import fake_quantize_activations, mix_activations, quantize_activations


def test_codes_and_scales_follow_the_absmax_definition():
    x = torch.randn(5, 7, 96, generator=torch.Generator().manual_seed(0)) * 3
    codes, scale, _ = quantize_activations(x)
    absmax = np.abs(x.numpy()).max(axis=-1, keepdims=True)
    np.testing.assert_array_equal(scale.numpy(), absmax * np.float32(1 / 127))
    np.testing.assert_array_equal(codes.numpy(), np.round(x.numpy() / scale.numpy()).astype(np.int8))
    assert codes.abs().amax() == 127


def test_a_row_of_zeros_is_zero_and_its_scale_finite():
    codes, scale, _ = quantize_activations(torch.zeros(2, 8))
    assert not codes.any()
    assert torch.isfinite(scale).all()


def test_fake_quantised_values_are_the_codes_times_the_scale():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    codes, scale, _ = quantize_activations(x)
    assert torch.equal(fake_quantize_activations(x), codes.float() * scale)


def test_the_error_is_at_most_half_a_step():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    _, scale, _ = quantize_activations(x)
    assert ((fake_quantize_activations(x) - x).abs() <= scale * 0.5 * (1 + 1e-5)).all()


def test_the_gradient_passes_straight_through():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4))
    (fake_quantize_activations(x) * weight).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_activations_are_between_x_and_its_rounding_with_the_gradient_of_x(share, dtype):
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    mixed = mix_activations(x, torch.tensor(share))
    wide = x.detach().double()
    step = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127
    expected = wide + share * ((wide / step).round() * step - wide)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.detach().double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 2e-2)
    if share == 0:
        assert torch.equal(mixed, x)
    weights = torch.randn_like(x)
    assert torch.equal(torch.autograd.grad(mixed, x, weights)[0], weights)
