"""The gradients of int8 training in Triton: rounding of dy, integer products that share or add up, layouts.

Codes, scales and integer products equal the reference bit for bit; in bfloat16 a sum of several layers is rounded
after each of them.
"""

import pytest
import torch

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
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(products._int8_product, product, test_utils=tests)
    for wants in ((True, True), (False, True), (True, False)):
        gradients = (dys, x, x_scale.unsqueeze(1), weights, scales, torch.bfloat16, *wants)
        torch.library.opcheck(products._int8_gradients_on_cuda, gradients, test_utils=tests)
    packed = PackedTernary.pack(reference.ternarize(random(32, 128, seed=1)))
    torch.library.opcheck(
        products._packed_product, (*product[:2], packed.packed, packed.scales, torch.float32), test_utils=tests
    )


@pytest.mark.parametrize("group", [None, 64])
@pytest.mark.parametrize("tokens", [3, 40, 70])
def test_a_packed_product_needs_no_sums_of_its_activations(tokens, group):
    weight, x = (
        PackedTernary.pack(reference.ternarize(random(20, 128, seed=1), group or "row")),
        random(tokens, 128, seed=2),
    )
    a = reference.quantize_activations(x)
    found = operations.ternary_matmul(a._replace(sums=a.sums[:, :0]), weight)
    torch.testing.assert_close(found, reference.ternary_matmul(a, weight), rtol=1e-5, atol=1e-4 if group else 0)
