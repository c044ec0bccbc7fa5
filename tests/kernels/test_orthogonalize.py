"""Newton-Schulz with integer products: close to the iteration in float64, whatever computes it."""

import pytest
import torch

from nanochat_cli.optim.newton_schulz import coefficients, orthogonalize
from nanochat_kernels import iterate_int8
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu import native, operations
from nanochat_kernels.linear_products import products_are_exact

SHAPES = [(16, 16), (17, 33), (64, 64), (48, 160), (128, 384)]


def matrix(rows: int, columns: int, decay: float = 1.0) -> torch.Tensor:
    """Of norm 1, with singular values that fall by 10 ** decay, as those of a momentum do."""
    generator = torch.Generator().manual_seed(rows + columns)
    x = torch.randn(rows, columns, generator=generator) * torch.logspace(0, -decay, rows).unsqueeze(1)
    x = torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q @ x
    return x / x.norm()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture(params=["reference", "portable", "avx2", "avx512"])
def backend(request):
    if request.param == "reference":
        yield "reference"
        return
    if not products_are_exact():
        pytest.skip("products of int8 codes are not exact on this CPU")
    try:
        native.select(request.param)
    except Unsupported as reason:
        pytest.skip(str(reason))
    yield "cpu"
    native.select(None)


@pytest.mark.parametrize(("kind", "steps"), [("keller-jordan", 5), ("polar-express", 5), ("cans", 3)])
def test_the_result_is_as_close_to_float64_as_that_of_bfloat16(backend, kind, steps):
    for shape in SHAPES:
        x = matrix(*shape)
        exact = orthogonalize(x.double().unsqueeze(0), steps, kind)[0]
        scaled = x / 1.01 if kind == "polar-express" else x.clone()
        found = iterate_int8(scaled, coefficients(kind, steps), kind == "cans", backend=backend)
        rough = orthogonalize(x.bfloat16().unsqueeze(0), steps, kind)[0].double()
        assert distance(found.double(), exact) < max(0.03, 3 * distance(rough, exact)), shape


def test_one_iteration_is_the_polynomial_up_to_the_rounding_of_codes(backend):
    for shape in SHAPES:
        x = matrix(*shape, decay=0)
        a, b, c = coefficients("keller-jordan", 1)[0]
        gram = x.double() @ x.double().T
        exact = a * x.double() + (b * gram + c * gram @ gram) @ x.double()
        assert distance(iterate_int8(x.clone(), [(a, b, c)], backend=backend).double(), exact) < 5e-3, shape


def test_the_bits_do_not_depend_on_the_number_of_threads():
    x, before = matrix(128, 384), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            native.library().nk_set_threads(threads)
            results.append(iterate_int8(x.clone(), coefficients("keller-jordan", 3), backend="cpu"))
    finally:
        torch.set_num_threads(before)
        native.library().nk_set_threads(before)
    assert torch.equal(*results)


def test_tall_matrices_are_orthogonalised_like_wide_ones():
    x = matrix(48, 160).unsqueeze(0)
    wide, tall = (orthogonalize(y, number_format="int8") for y in (x, x.mT))
    assert torch.equal(wide, tall.mT)
    assert wide.dtype == torch.float32


def test_where_int8_products_saturate_the_reference_computes(monkeypatch):
    """As on CPUs with AVX2 alone, where sums of large codes come out wrong without a word."""
    x = matrix(48, 160).unsqueeze(0)
    monkeypatch.setitem(orthogonalize.__globals__, "products_are_exact", lambda: False)
    monkeypatch.setattr(operations, "iterate_int8", lambda *arguments: pytest.fail("products that are not exact"))
    exact = orthogonalize(x.double())
    assert distance(orthogonalize(x, number_format="int8").double(), exact) < 0.03


def test_diagonals_among_the_codes_would_cost_five_times_the_error():
    def rounded(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        step = y.abs().amax(dim=1, keepdim=True) / 127
        return (y / step).round(), step

    x = matrix(128, 384, decay=0)
    exact = orthogonalize(x.double().unsqueeze(0))[0]
    naive = x.double()
    for a, b, c in coefficients("keller-jordan", 5):
        codes, step = rounded(naive)
        gram = (codes @ codes.T) * step * step.T
        gram_codes, gram_step = rounded(gram)
        square = (gram_codes @ gram_codes.T) * gram_step * gram_step.T
        polynomial, own = rounded((b * gram + c * square) * step.T)
        naive = a * naive + (polynomial @ codes) * own
    kept_apart = iterate_int8(x.clone(), coefficients("keller-jordan", 5), backend="reference")
    assert distance(naive, exact) > 5 * distance(kept_apart.double(), exact)
