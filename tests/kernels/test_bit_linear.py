"""The ternary layer in training: exact integers forward, the straight-through formula backward, rows left out."""

import pytest
import torch

from nanochat_cli.training.cpp_compiler import find_compiler
from nanochat_kernels import (
    Form,
    KeptRows,
    LinearWeight,
    PackedTernary,
    bit_linear,
    choose_form,
    quantize_activations,
    quantize_input,
    ternarize,
    ternary_matmul,
)

FORMS: list[Form] = ["float", "int8"]


def random(*shape: int, seed: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), requires_grad=grad)


def quantized(latent: torch.Tensor, scale: str | int = "row") -> LinearWeight:
    ternary = ternarize(latent.detach(), scale)
    packed = PackedTernary.pack(ternary)
    if packed.n_groups == 1:
        return LinearWeight(ternary.codes.float(), packed.scales.squeeze(1), packed.packed, packed.scales)
    return LinearWeight(ternary.dequantize(), None, packed.packed, packed.scales)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_the_forward_pass_is_packed_inference_to_the_last_bit(form, scale, backend):
    latent, x = random(96, 512, seed=1), random(5, 7, 512, seed=2)
    weight = quantized(latent, scale)
    expected = ternary_matmul(
        quantize_activations(x, backend=backend), PackedTernary.pack(ternarize(latent, scale)), backend=backend
    )
    assert torch.equal(bit_linear(quantize_input(x, form), latent, weight), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["row", 128])
def test_forward_and_gradients_are_those_of_the_straight_through_formula(form, scale):
    latent, x = random(64, 256, seed=3, grad=True), random(3, 5, 256, seed=4, grad=True)
    dy = random(3, 5, 64, seed=5)
    codes, a_scale, _ = quantize_activations(x.detach())
    x_hat = x + (codes * a_scale - x).detach()
    w_hat = latent + (ternarize(latent.detach(), scale).dequantize() - latent).detach()
    expected = torch.nn.functional.linear(x_hat, w_hat)
    y = bit_linear(quantize_input(x, form), latent, quantized(latent, scale))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(y, (x, latent), dy), torch.autograd.grad(expected, (x, latent), dy), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_rows_left_out_have_no_gradient_and_the_others_the_one_they_had(form):
    """Oracle: the plain backward pass of dy with the rows left out set to zero."""
    latent, x = random(32, 128, seed=6, grad=True), random(2, 6, 128, seed=7, grad=True)
    dy = random(2, 6, 32, seed=8)
    kept = torch.tensor([0, 3, 4, 9, 11])
    masked = torch.zeros_like(dy)
    masked.view(12, 32)[kept] = dy.view(12, 32)[kept]
    weight = quantized(latent)
    full = bit_linear(quantize_input(x, form), latent, weight)
    chosen = KeptRows.all_of(12)
    subset = bit_linear(quantize_input(x, form), latent, weight, chosen)
    chosen.choose(kept)  # after the forward pass
    assert torch.equal(full, subset)
    dx, dw = torch.autograd.grad(subset, (x, latent), dy)
    expected_dx, expected_dw = torch.autograd.grad(full, (x, latent), masked)
    left_out = [row for row in range(12) if row not in kept.tolist()]
    assert not dx.view(12, 128)[left_out].any()
    torch.testing.assert_close(dx, expected_dx, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dw, expected_dw, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_choice_known_before_saves_only_kept_rows_and_gives_the_same_gradients(form):
    latent, x, dy = random(32, 128, seed=6, grad=True), random(12, 128, seed=7, grad=True), random(12, 32, seed=8)
    weight, kept = quantized(latent), torch.tensor([0, 3, 4, 9, 11])
    gradients, sizes = [], []
    for known in (False, True):
        chosen = KeptRows.all_of(12, known=known)
        chosen.choose(kept)
        y = bit_linear(quantize_input(x, form, chosen), latent, weight, chosen)
        sizes.append(len(y.grad_fn.saved_tensors[0]))
        gradients.append(torch.autograd.grad(y, (x, latent), dy))
    assert sizes == [12, 5]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_backward_reads_the_choice_made_after_the_forward_pass(form):
    if find_compiler().path is None:
        pytest.skip("no C++ compiler on this machine")
    latent, x, dy = random(32, 128, seed=6, grad=True), random(12, 128, seed=7, grad=True), random(12, 32, seed=8)
    weight, chosen = quantized(latent), KeptRows.all_of(12)

    def product(x, latent):
        return bit_linear(quantize_input(x, form), latent, weight, chosen).sin()

    compiled = torch.compile(product, dynamic=False)
    for kept in ([0, 3, 4, 9, 11], [1, 2, 5, 6, 7], [2, 8]):  # the last: another count, the same code
        found = []
        for function in (compiled, product):
            chosen.choose(torch.arange(12))
            y = function(x, latent)
            chosen.choose(torch.tensor(kept))
            found.append(torch.autograd.grad(y, (x, latent), dy))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_keeping_every_row_is_the_plain_backward_pass_to_the_last_bit(form):
    latent, x = random(32, 128, seed=9, grad=True), random(8, 128, seed=10, grad=True)
    dy, weight = random(8, 32, seed=11), quantized(latent)
    gradients = [
        torch.autograd.grad(bit_linear(quantize_input(x, form), latent, weight, kept), (x, latent), dy)
        for kept in (None, KeptRows.all_of(8))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_int8_form_keeps_a_quarter_of_the_memory_for_the_backward_pass():
    latent, x = random(32, 128, seed=12, grad=True), random(64, 128, seed=13, grad=True)
    sizes = {}
    for form in FORMS:
        y = bit_linear(quantize_input(x, form), latent, quantized(latent))
        codes = y.grad_fn.saved_tensors[0]  # pyright: ignore[reportOptionalMemberAccess]
        sizes[form] = codes.numel() * codes.element_size()
    assert sizes["int8"] * 4 == sizes["float"]


@pytest.mark.parametrize("form", FORMS)
def test_under_bfloat16_autocast_the_output_is_bfloat16_and_the_codes_stay_exact(form):
    latent, x = random(32, 128, seed=14, grad=True), random(4, 128, seed=15, grad=True)
    exact = bit_linear(quantize_input(x, form), latent, quantized(latent))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = bit_linear(quantize_input(x, form), latent, quantized(latent))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=2**-7, atol=1e-3)
    y.float().sum().backward()
    assert latent.grad is not None
    assert latent.grad.dtype == torch.float32


def test_a_plain_tensor_is_multiplied_unquantised():
    latent, x = random(32, 128, seed=16, grad=True), random(4, 128, seed=17, grad=True)
    y = bit_linear(x, latent, quantized(latent))
    torch.testing.assert_close(y, x @ ternarize(latent.detach()).dequantize().T, rtol=1e-5, atol=1e-4)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(latent.grad, x.detach().sum(0).expand(32, 128), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_layer_computes_what_the_eager_one_does(form):
    latent, x = random(32, 128, seed=18, grad=True), random(4, 128, seed=19, grad=True)
    weight = quantized(latent)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return bit_linear(quantize_input(x, form), latent, weight)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    found, expected = (torch.autograd.grad(f(x).square().sum(), (x, latent)) for f in (compiled, layer))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_the_form_is_the_one_measured_faster_at_the_nearest_shape(monkeypatch):
    rows = [
        {"device": "cpu", "in": 256, "out": 256, "int8_speedup": 0.8},
        {"device": "cpu", "in": 1024, "out": 1024, "int8_speedup": 1.3},
    ]
    monkeypatch.setitem(choose_form.__globals__, "_measured", lambda: rows)
    cpu = torch.device("cpu")
    assert choose_form(cpu, 256, 384) == "float"
    assert choose_form(cpu, 1024, 4096) == "int8"
    assert choose_form(cpu, 1000, 1024) == "float"  # not a multiple of 128
    assert choose_form(torch.device("cuda"), 1024, 1024) == "float"  # not measured


def test_the_float8_gradient_of_the_input_is_off_only_by_the_rounding_of_dy():
    """e4m3 has 4 significant bits: each element of dy is off by at most 1/16 of itself, in any direction."""
    latent, x = random(64, 128, seed=20, grad=True), random(32, 128, seed=21, grad=True)
    dy, weight = random(32, 64, seed=22) * torch.logspace(-6, 3, 32).unsqueeze(1), quantized(latent)
    gradients = {}
    for backward in ("exact", "fp8"):
        y = bit_linear(quantize_input(x), latent, weight, backward=backward)
        gradients[backward] = torch.autograd.grad(y, (x, latent), dy)
    (exact, exact_dw), (rough, rough_dw) = gradients["exact"], gradients["fp8"]
    assert torch.equal(exact_dw, rough_dw)
    error = (rough - exact).norm(dim=1) / exact.norm(dim=1)
    assert (error < 0.06).all()
    assert (error > 1e-3).all()


def test_float8_is_only_for_one_scale_a_row():
    latent, x = random(32, 128, seed=23, grad=True), random(16, 128, seed=24, grad=True)
    weight = quantized(latent, 64)
    plain, rough = (
        torch.autograd.grad(bit_linear(quantize_input(x), latent, weight, backward=kind).sum(), x)[0]
        for kind in ("exact", "fp8")
    )
    assert torch.equal(plain, rough)
