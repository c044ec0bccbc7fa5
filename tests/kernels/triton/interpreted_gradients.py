"""The gradients of int8 training in Triton: rounding of dy, integer products that share or add up, layouts.

Codes, scales and integer products equal the reference bit for bit; in bfloat16 a sum of several layers is rounded
after each of them.
"""

from typing import Any

import pytest
import torch

from nanochat_kernels import KeptRows, LinearWeight, bit_linears, quantize_input, swiglu_feed_forward
from nanochat_kernels import linear_products as products
from nanochat_kernels.reference import operations as reference
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.triton_kernels import operations
from nanochat_kernels.triton_kernels.configurations import MatmulConfiguration
from nanochat_kernels.triton_kernels.int8_matmul import int8_matmul
from nanochat_kernels.triton_kernels.quantize_gradient import quantize_gradient, transpose

SHAPES = [(1, 1), (3, 17), (130, 64), (33, 300), (257, 48), (128, 128)]
TILE = MatmulConfiguration(64, 64, 32, 4, 3)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(*shape: int, largest: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8)


def gradient(m: int, n: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of very different size, as gradients have them."""
    return random(m, n, seed=seed) * torch.logspace(-6, 0, m).unsqueeze(1) * torch.logspace(-3, 0, n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_rows_and_columns_are_rounded_as_the_reference_rounds_them(m, n, dtype):
    dy, factor, weight = gradient(m, n).to(dtype), random(n, seed=1).abs(), random(m, seed=2).abs()
    for one in (factor, factor[:1]):
        for levels in (127.0, 63.0):
            found = operations.quantize_gradient(dy, one, weight, levels)
            wanted = reference.quantize_gradient(dy, one, weight, levels)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)), (m, n, levels)
            assert int(found.column_codes.abs().max()) == levels


def test_zeros_and_rows_of_a_larger_matrix_are_rounded_alike_and_columns_are_filled_up_with_zeros():
    dy = gradient(40, 96)[:, :32]
    dy[3], dy[:, 5] = 0, 0
    ones = torch.ones(32), torch.ones(40)
    found, wanted = operations.quantize_gradient(dy, *ones, 127.0), reference.quantize_gradient(dy, *ones)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    columns = quantize_gradient(dy.T.contiguous().T, *ones).columns
    assert columns.shape == (32, 128)
    assert torch.equal(columns[:, :40], wanted.column_codes.T)
    assert not columns[:, 40:].any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_lost_in_the_rounding(bad):
    dy = random(32, 16, seed=0)
    dy[4, 7] = bad
    out = operations.quantize_gradient(dy, torch.ones(16), torch.ones(32), 127.0)
    assert not (out.codes[4].float() * out.scale[4]).isfinite().all()
    assert not (out.column_codes[:, 7].float() * out.column_scale[7]).isfinite().all()
    assert out.scale[torch.arange(32) != 4].isfinite().all()


@pytest.mark.parametrize(("m", "k"), [(1, 1), (3, 200), (129, 130)])
def test_codes_are_transposed_and_filled_up_with_zeros(m, k):
    x = codes(m, k, largest=127, seed=1)
    y = transpose(x)
    assert y.shape[1] % 128 == 0
    assert torch.equal(y[:, :m], x.T)
    assert not y[:, m:].any()


@pytest.mark.parametrize("splits", [1, 2, 5, 100])
@pytest.mark.parametrize(("m", "n", "k"), [(70, 65, 320), (1, 3, 17)])
def test_sharing_the_inputs_of_a_product_changes_no_bit(m, n, k, splits):
    a, b = codes(m, k, largest=127, seed=1), codes(n, k, largest=127, seed=2)
    scales = random(m, 1, seed=3).abs(), random(n, 1, seed=4).abs()
    found = int8_matmul(a, b, *scales, configuration=TILE, splits=splits)
    assert torch.equal(found, reference.int8_matmul(a, b, *scales))


def layers(m: int, k: int, sizes: tuple[int, ...]):
    """dys, codes of x and their scale, codes of the weights and their scales."""
    dys = [gradient(m, n, seed=n) for n in sizes]
    weights = [codes(n, k, largest=1, seed=n) for n in sizes]
    scales = [random(n, seed=n + 1).abs() for n in sizes]
    return dys, codes(m, k, largest=127, seed=0), random(m, seed=5).abs(), weights, scales


@pytest.mark.parametrize(("m", "k", "sizes"), [(130, 64, (48, 17)), (1, 5, (3,)), (40, 256, (128,))])
@pytest.mark.parametrize("transposed", [True, False])
def test_both_gradients_equal_the_reference_bit_for_bit(m, k, sizes, transposed):
    dys, x, x_scale, weights, scales = layers(m, k, sizes)
    wanted = reference.int8_gradients(dys, x, x_scale, weights, scales, torch.float32)
    laid_out = [w.T.contiguous().T for w in weights] if transposed else weights
    found = operations.int8_gradients(dys, x, x_scale, laid_out, scales, torch.float32)
    for some, of_reference in zip(found, wanted, strict=True):
        assert len(some) == len(sizes)
        assert all(torch.equal(a, b) for a, b in zip(some, of_reference, strict=True))


def test_no_rows_have_a_gradient_of_zero():
    """The reference has no largest value of nothing."""
    arguments = [torch.zeros(0, 4)], *layers(0, 8, ())[1:3], [codes(4, 8, largest=1, seed=1)], [torch.ones(4)]
    (dx,), (dw,) = operations.int8_gradients(*arguments, torch.float32)
    assert dx.shape == (0, 8)
    assert torch.equal(dw, torch.zeros(4, 8))


def test_in_bfloat16_only_dx_is_rounded_and_what_is_not_wanted_is_not_computed():
    dys, x, x_scale, weights, scales = layers(64, 96, (32, 48))
    dys = [dy.bfloat16() for dy in dys]
    exact, dws = reference.int8_gradients(dys, x, x_scale, weights, scales, torch.float32)
    dxs, none = operations.int8_gradients(dys, x, x_scale, weights, scales, torch.bfloat16, (True, False))
    assert none == []
    for found, wanted in zip(dxs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        assert ((found.float() - wanted).abs() <= 2**-7 * wanted.abs()).all()  # the interpreter cuts off
    none, found = operations.int8_gradients(dys, x, x_scale, weights, scales, torch.bfloat16, (False, True))
    assert none == []
    assert all(torch.equal(a, b) for a, b in zip(found, dws, strict=True))


def test_the_nodes_of_a_compiled_graph_have_the_shapes_that_they_say(monkeypatch):
    """`opcheck` compares each with its fake; the backend is asked for, since the tensors are on the CPU."""
    monkeypatch.setenv("NANOCHAT_BACKEND", "triton")
    dys, x, x_scale, weights, scales = layers(34, 128, (32, 16))
    product = (x.view(2, 17, 128), x_scale.view(2, 17, 1), weights[0], scales[0], torch.bfloat16)
    checks: list[tuple[Any, tuple[Any, ...]]] = [(products._int8_product, product)]
    for wants in ((True, True), (False, True), (True, False)):
        gradients = (dys, x, x_scale.unsqueeze(1), weights, scales, torch.bfloat16, *wants)
        checks.append((products._int8_gradients_on_cuda, gradients))
    packed = PackedTernary.pack(reference.ternarize(random(32, 128, seed=1)))
    checks.append((products._packed_product, (*product[:2], packed.packed, packed.scales, torch.float32)))
    for node, arguments in checks:
        outcome = torch.library.opcheck(node, arguments, test_utils=("test_schema", "test_faketensor"))
        assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("tokens", [3, 40, 70])
def test_a_packed_product_needs_no_sums_of_its_activations(tokens, group):
    weight, x = (
        PackedTernary.pack(reference.ternarize(random(5, 128, seed=1), group or "row")),
        random(tokens, 128, seed=2),
    )
    a = reference.quantize_activations(x)
    found = operations.ternary_matmul(a._replace(sums=a.sums[:, :0]), weight)
    torch.testing.assert_close(found, reference.ternary_matmul(a, weight), rtol=1e-5, atol=1e-4 if group else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_layer_computes_what_torch_does_on_a_cpu(monkeypatch, dtype):
    """Oracle: the path of CPUs, torch's own integer products, in the same graph. A last digit may move a code."""
    latents = [random(n, 128, seed=n).requires_grad_() for n in (48, 16)]
    ternary = [reference.ternarize(latent.detach()) for latent in latents]
    x, dys = random(2, 20, 128, seed=3).requires_grad_(), [random(2, 20, n, seed=4) for n in (48, 16)]

    def gradients(transposed: bool) -> list[torch.Tensor]:
        def layers(x: torch.Tensor, *latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
            held = [(t.codes, t.scales.squeeze(1), None, t.scales) for t in ternary]
            weights = [LinearWeight(*h, h[0].T.contiguous() if transposed else None) for h in held]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return bit_linears(quantize_input(x.sin(), "int8"), latents, weights, backward="int8")

        torch.compiler.reset()
        ys = torch.compile(layers, backend="aot_eager", dynamic=False)(x, *latents)
        assert all(y.dtype == dtype for y in ys)
        return [*ys, *torch.autograd.grad(ys, (x, *latents), [dy.to(dtype) for dy in dys])]

    wanted = gradients(transposed=False)
    calls = use_own_products(monkeypatch)
    for a, b in zip(gradients(transposed=True), wanted, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).detach().norm() / b.detach().norm()) < (1e-5 if dtype == torch.float32 else 1e-2)
    assert calls == ["product", "product", "gradients"]


def use_own_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """As on CUDA; and what was called."""
    calls: list[str] = []
    for name in ("int8_gradients", "int8_matmul"):
        function = getattr(products, name)

        def counted(*arguments, function=function, name=name):
            calls.append({"int8_gradients": "gradients", "int8_matmul": "product"}[name])
            return function(*arguments)

        monkeypatch.setattr(products, name, counted)
    monkeypatch.setenv("NANOCHAT_BACKEND", "triton")
    monkeypatch.setattr(products, "has_own_products", lambda x: True)
    return calls


@pytest.mark.parametrize("known", [True, False, None])
def test_a_feed_forward_with_rows_left_out_computes_what_torch_does_on_a_cpu(monkeypatch, known):
    latents = [random(*shape, seed=7).requires_grad_() for shape in ((64, 128), (64, 128), (128, 64))]
    weights = [LinearWeight(t.codes, t.scales.squeeze(1)) for t in map(reference.ternarize, latents)]
    x, dy = random(50, 128, seed=1).requires_grad_(), random(50, 128, seed=2)

    def gradients() -> tuple[torch.Tensor, ...]:
        kept = None if known is None else KeptRows.all_of(50, known=known)
        if kept is not None:
            kept.choose(torch.arange(0, 50, 3))
        y = swiglu_feed_forward(quantize_input(x, "int8", kept), latents, weights, "int8", kept, "int8")
        return y, *torch.autograd.grad(y, (x, *latents), dy)

    wanted = gradients()
    calls = use_own_products(monkeypatch)
    for a, b in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))
    assert calls == ["product"] * 3 + ["gradients"] * 2
