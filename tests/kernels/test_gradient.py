"""The gradient in int8: its rounding to the last bit, and what the rounding does to the products of a backward pass."""

import pytest
import torch

from nanochat_cli.training.cpp_compiler import find_compiler
from nanochat_kernels import Backward, KeptRows, LinearWeight, bit_linear, bit_linears, quantize_input, ternarize
from nanochat_kernels.linear_products import column_levels, integer_product, linear_gradients
from nanochat_kernels.operations import quantize_gradient

CPU = torch.device("cpu")
SHAPES = [(1, 1), (3, 17), (31, 64), (33, 65), (257, 48), (64, 300)]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradient(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different size, as gradients have them."""
    return random(m, n, seed=seed) * torch.logspace(-6, 0, m).unsqueeze(1) * torch.logspace(-3, 0, n)


def layer(n: int, k: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """int8 weight codes [n, k] and their scale [n], activation codes [m, k] and their scale [m, 1]."""
    ternary, activations = ternarize(random(n, k, seed=1)), quantize_input(random(m, k, seed=2), "int8")
    return ternary.codes, ternary.scales.squeeze(1), activations.codes, activations.scale


@pytest.mark.parametrize("levels", [127.0, 63.0])
@pytest.mark.usefixtures("kernel_set")
def test_every_set_of_kernels_rounds_as_the_reference(levels):
    for m, n in SHAPES:
        dy, factor, weight = gradient(m, n), random(n, seed=1).abs(), random(m, seed=2).abs()
        found = quantize_gradient(dy, factor, weight, levels, backend="cpu")
        wanted = quantize_gradient(dy, factor, weight, levels, backend="reference")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (m, n)
        assert int(found.column_codes.abs().max()) == levels
        assert int(found.codes.abs().amax(dim=1).min()) == 127


@pytest.mark.usefixtures("kernel_set")
def test_rows_of_a_larger_matrix_and_zeros_are_rounded_alike():
    dy = gradient(40, 96)[:, :32]
    dy[3], dy[:, 5] = 0, 0
    ones = torch.ones(32), torch.ones(40)
    found, wanted = (quantize_gradient(dy, *ones, backend=backend) for backend in ("cpu", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert not found.codes[3].any()
    assert not found.column_codes[:, 5].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_not_finite_is_not_lost_in_the_rounding(bad, backend):
    dy = random(32, 16, seed=0)
    dy[4, 7] = bad
    out = quantize_gradient(dy, torch.ones(16), torch.ones(32), backend=backend)
    assert not (out.codes[4].float() * out.scale[4]).isfinite().all()
    assert not (out.column_codes[:, 7].float() * out.column_scale[7]).isfinite().all()


@pytest.mark.parametrize("levels", [127.0, 63.0])
def test_the_error_of_int8_gradients_is_that_of_half_a_step_of_dy(monkeypatch, levels):
    """|Δdx| ≤ ½ step of the row · Σ |w|, |Δdw| ≤ ½ step of the column · Σ |x|; against the products in float64."""
    monkeypatch.setitem(linear_gradients.__globals__, "column_levels", lambda device: levels)
    codes, w_scale, x_codes, x_scale = layer(48, 80, 200)
    dy = gradient(200, 48)
    dx, (dw,) = linear_gradients([dy], x_codes, x_scale, [codes], [w_scale], torch.float32, "int8")
    by_row, by_column = dy.double() * w_scale, dy.double() * x_scale
    steps = by_row.abs().amax(dim=1, keepdim=True) / 127, by_column.abs().amax(dim=0).unsqueeze(1) / levels
    assert dx is not None
    wrong_dx, wrong_dw = (dx - by_row @ codes.double()).abs(), (dw - by_column.T @ x_codes.double()).abs()
    assert (wrong_dx <= 0.5001 * steps[0] * codes.double().abs().sum(dim=0)).all()
    assert (wrong_dw <= 0.5001 * steps[1] * x_codes.double().abs().sum(dim=0)).all()
    assert wrong_dx.max() > 0
    assert wrong_dw.max() > 0


def test_bf16_gradients_round_dy_and_sums_only():
    codes, w_scale, x_codes, x_scale = layer(48, 80, 200)
    dy = gradient(200, 48)
    dx, (dw,) = linear_gradients([dy], x_codes, x_scale, [codes.float()], [w_scale], torch.float32, "bf16")
    by_row, by_column = dy.double() * w_scale, dy.double() * x_scale
    assert dx is not None
    assert dx.dtype == dw.dtype == torch.float32
    for found, exact, terms in (
        (dx, by_row @ codes.double(), by_row.abs() @ codes.double().abs()),
        (dw, by_column.T @ x_codes.double(), by_column.abs().T @ x_codes.double().abs()),
    ):
        assert ((found - exact).abs() <= 3 * 2**-9 * terms).all()
        assert not torch.equal(found.double(), exact)


@pytest.mark.parametrize("backward", ["bf16", "int8"])
def test_rows_left_out_are_as_if_they_had_not_been_there(backward: Backward):
    x, latents = random(60, 64, seed=3), [random(n, 64, seed=n) for n in (32, 16)]
    ternary = [ternarize(latent) for latent in latents]
    weights = [LinearWeight(t.codes, t.scales.squeeze(1)) for t in ternary]
    rows, dys = torch.tensor([0, 7, 8, 59]), [random(60, n, seed=9) for n in (32, 16)]
    kept = KeptRows.all_of(60)
    kept.choose(rows)

    def gradients(x: torch.Tensor, dys: list[torch.Tensor], kept: KeptRows | None) -> tuple[torch.Tensor, ...]:
        inputs = [x.clone().requires_grad_(), *(latent.clone().requires_grad_() for latent in latents)]
        ys = bit_linears(quantize_input(inputs[0], "int8"), inputs[1:], weights, kept, backward)
        return torch.autograd.grad(ys, inputs, dys)

    dx, *dws = gradients(x, dys, kept)
    dx_alone, *dws_alone = gradients(x[rows], [dy[rows] for dy in dys], None)
    assert torch.equal(dx[rows], dx_alone)
    assert not dx[1:7].any()
    assert all(torch.equal(a, b) for a, b in zip(dws, dws_alone, strict=True))


def test_the_forward_pass_with_one_int8_operand_has_the_bits_of_the_others():
    latent, x = random(96, 256, seed=1), random(5, 7, 256, seed=2)
    ternary = ternarize(latent)
    scale = ternary.scales.squeeze(1)
    expected = bit_linear(quantize_input(x), latent, LinearWeight(ternary.codes.float(), scale))
    assert torch.equal(bit_linear(quantize_input(x, "int8"), latent, LinearWeight(ternary.codes, scale)), expected)


def test_groups_of_scales_and_float_activations_keep_the_exact_gradient():
    codes, w_scale, x_codes, x_scale = layer(48, 128, 40)
    dy = random(40, 48, seed=5)
    for scales, scale in (([None], x_scale), ([w_scale], None)):
        arguments = ([dy], x_codes.float(), scale, [codes.float()], scales, torch.float32)
        (dx, (dw,)), (wanted_dx, (wanted_dw,)) = linear_gradients(*arguments, "int8"), linear_gradients(*arguments)
        assert dx is not None
        assert wanted_dx is not None
        assert torch.equal(dx, wanted_dx)
        assert torch.equal(dw, wanted_dw)


def test_a_compiled_backward_pass_has_the_gradients_of_the_eager_one():
    if find_compiler().path is None:
        pytest.skip("no C++ compiler on this machine")
    ternary = ternarize(random(32, 64, seed=1))
    weight = LinearWeight(ternary.codes, ternary.scales.squeeze(1))

    def block(x: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        return bit_linear(quantize_input(x, "int8"), latent, weight, backward="int8").sin()

    inputs = random(64, 64, seed=2).requires_grad_(), random(32, 64, seed=3).requires_grad_()
    found, wanted = (
        torch.autograd.grad(function(*inputs), inputs, random(64, 32, seed=4))
        for function in (torch.compile(block, dynamic=False), block)
    )
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 0.01  # a last digit of dy may move a code


def test_the_levels_are_those_of_exact_products_here():
    levels = int(column_levels(CPU))
    a, b = torch.full((64, 96), 127, dtype=torch.int8), torch.full((96, 32), levels, dtype=torch.int8)
    assert torch.equal(integer_product(a, b), torch.full((64, 32), 96 * 127 * levels, dtype=torch.int32))
    assert levels in (63, 127)
