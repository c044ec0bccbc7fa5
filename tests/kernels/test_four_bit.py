"""Training layers whose activations are in NVFP4: bytes and emulated values say the same, and neither is silent."""

import logging

import pytest
import torch

import nanochat_kernels
from nanochat_kernels import LinearWeight, bit_linear, nvfp4_ternary, quantize_input, swiglu_feed_forward, ternarize
from nanochat_kernels.four_bit import has_nvfp4
from nanochat_kernels.kept_rows import KeptRows
from tests.kernels import nvfp4_oracle as oracle


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(outputs: int, inputs: int, form: str, seed: int = 1) -> tuple[torch.Tensor, LinearWeight]:
    latent = normal(outputs, inputs, seed=seed).requires_grad_()
    ternary = ternarize(latent.detach())
    packed = nvfp4_ternary(ternary.codes) if form == "nvfp4" else None
    return latent, LinearWeight(ternary.codes.float(), ternary.scales.squeeze(1), packed, ternary.scales)


FORMS = ["nvfp4", "nvfp4-emulated"]


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_its_gradients_are_those_of_the_rounded_activations(form):
    """dy passes straight through both roundings: dx = dy · W, dw = dyᵀ · Q(x)."""
    x, dy = normal(6, 64).requires_grad_(), normal(6, 24, seed=3)
    latent, weight = layer(24, 64, form)
    y = bit_linear(quantize_input(x, form), latent, weight)
    dx, dw = torch.autograd.grad(y, (x, latent), dy)
    codes, blocks, scale = oracle.quantize(x.detach())
    rounded = oracle.values(codes, blocks) * scale.double().unsqueeze(1)
    assert weight.w_scale is not None
    effective = weight.operand.double() * weight.w_scale.double().unsqueeze(1)
    for found, expected in ((y, rounded @ effective.T), (dx, dy.double() @ effective), (dw, dy.double().T @ rounded)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (rounded - x.detach()).abs().max() > 0.1  # it rounds


def test_bytes_and_emulated_values_give_one_feed_forward_and_gradients():
    found = []
    for form in FORMS:
        x, shapes = normal(8, 32).requires_grad_(), ((48, 32), (48, 32), (32, 48))
        latents, weights = zip(*(layer(*shape, form, seed) for seed, shape in enumerate(shapes)), strict=True)
        y = swiglu_feed_forward(quantize_input(x, form), latents, weights, form)
        found.append([y.detach(), *torch.autograd.grad(y, (x, *latents), torch.cos(y.detach()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_filtered_have_no_gradient_and_the_others_that_of_their_rows(form):
    x, dy, kept = normal(6, 64), normal(6, 24, seed=3), torch.tensor([0, 2, 5])
    chosen = torch.tensor([True, False, True, False, False, True])
    latent, weight = layer(24, 64, form)
    whole, part = x.clone().requires_grad_(), x[kept].requires_grad_()
    order = torch.cat([kept, torch.tensor([1, 3, 4])])
    rows = KeptRows(order, torch.tensor(len(kept)), known=True)
    y = bit_linear(quantize_input(whole, form, rows), latent, weight, rows)
    dx, dw = torch.autograd.grad(y, (whole, latent), dy)
    z = bit_linear(quantize_input(part, form), latent, weight)
    part_dx, part_dw = torch.autograd.grad(z, (part, latent), dy[kept])
    torch.testing.assert_close(dw, part_dw)
    torch.testing.assert_close(dx[chosen], part_dx)
    assert not dx[~chosen].any()


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_holds_the_values_and_rounds_the_product_alone(form):
    x = normal(16, 128)
    latent, weight = layer(32, 128, form)
    exact = bit_linear(quantize_input(x, form), latent, weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = bit_linear(quantize_input(x, form), latent, weight)
    assert found.dtype == torch.bfloat16
    assert float((found.float() - exact).detach().norm() / exact.detach().norm()) < 2**-8


def test_bytes_are_nine_sixteenths_of_an_input():
    codes = quantize_input(normal(4, 256), "nvfp4").codes
    assert (codes.dtype, codes.shape) == (torch.uint8, (4, 144))


def test_a_cpu_that_computes_the_bytes_says_so_and_emulating_on_purpose_does_not(caplog):
    assert not has_nvfp4(torch.device("cpu"))
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        nanochat_kernels.backends._said.clear()
        quantize_input(normal(2, 16), "nvfp4-emulated")
        assert not caplog.text
        quantize_input(normal(2, 16), "nvfp4")
    assert "cannot compute nvfp4_quantize here" in caplog.text


@pytest.mark.parametrize(
    ("capability", "hip", "expected"),
    [((9, 0), None, False), ((10, 0), None, True), ((10, 3), None, True), ((11, 0), None, False), ((12, 0), None, True),
     ((12, 0), "7.0", False)],
)  # fmt: skip
def test_nvfp4_is_there_on_blackwell_gpus_that_the_kernel_was_compiled_for(monkeypatch, capability, hip, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert has_nvfp4(torch.device("cuda")) is expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_compiled_it_is_what_it_is_without_a_compiler(form):
    x, dy = normal(6, 64).requires_grad_(), normal(6, 24, seed=3)
    latent, weight = layer(24, 64, form)

    def step(x: torch.Tensor) -> torch.Tensor:
        return bit_linear(quantize_input(x * 1.5, form), latent, weight)

    plain, compiled = (function(x) for function in (step, torch.compile(step, fullgraph=True)))
    torch.testing.assert_close(compiled, plain)
    for one, other in zip(*(torch.autograd.grad(y, (x, latent), dy) for y in (plain, compiled)), strict=True):
        torch.testing.assert_close(one, other)
