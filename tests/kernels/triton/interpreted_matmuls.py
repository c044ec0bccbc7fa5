"""Products: integer parts equal the reference bit for bit, so row-scaled results are equal too.

Group-scaled and fp8 results add floats in another order: 1e-5 of the sum of magnitudes (K rounding errors of 2⁻²⁴
each, K ≤ 2048 here, lie below 1.3e-4 in the worst case and near 3e-6 in the square mean).
"""

import pytest
import torch

from nanochat_kernels import PackedTernary, Ternary
from nanochat_kernels.reference import operations as reference
from nanochat_kernels.triton_kernels import operations
from nanochat_kernels.triton_kernels.configurations import (
    GemvConfiguration,
    MatmulConfiguration,
    SmallMatmulConfiguration,
)
from nanochat_kernels.triton_kernels.gemv import ternary_gemv
from nanochat_kernels.triton_kernels.int8_matmul import int8_matmul, scaled_matmul
from nanochat_kernels.triton_kernels.small_matmul import ternary_small_matmul

SHAPES = [(127, 128), (1, 4096), (17, 128), (33, 256), (63, 384), (65, 256), (24, 640), (8, 2048)]
GROUPS = [64, 128, 256, 384]
# For the interpreter, whose time is proportional to programs: few outputs, and many rows per program.
GEMV = GemvConfiguration(8, 32, 1)


def packed_weight(rows: int, columns: int, group: int | None = None, fill: int | None = None, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    if fill is not None:
        codes = torch.full_like(codes, fill)
    groups = columns // group if group else 1
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).half().float()
    return PackedTernary.pack(Ternary(codes, scales, group or "row"))


def activations(tokens: int, columns: int, group: int | None = None, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return reference.quantize_activations(torch.randn(tokens, columns, generator=generator), group)


def assert_close(actual: torch.Tensor, a, weight: PackedTernary) -> None:
    expected = reference.ternary_matmul(a, weight)
    magnitude = reference.ternary_matmul(
        a._replace(codes=a.codes.abs()), PackedTernary.pack(_absolute(weight.ternary()))
    )
    assert ((actual - expected).abs() <= 1e-5 * magnitude).all()


def _absolute(ternary: Ternary) -> Ternary:
    return Ternary(ternary.codes.abs(), ternary.scales, ternary.granularity)


@pytest.mark.parametrize(("rows", "columns", "tokens"), [*((*shape, 1) for shape in SHAPES), (17, 128, 3), (9, 640, 3)])
def test_gemv_with_row_scales_equals_the_reference_bit_for_bit(rows, columns, tokens):
    weight, a = packed_weight(rows, columns), activations(tokens, columns)
    assert torch.equal(ternary_gemv(a, weight, configuration=GEMV), reference.ternary_matmul(a, weight))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_gemv_with_group_scales_is_within_float32_summation_error(group, tokens):
    weight, a = packed_weight(11, 768, group), activations(tokens, 768, group)
    assert_close(ternary_gemv(a, weight, configuration=GEMV), a, weight)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("tokens", [5, 17])
def test_small_matmul_with_row_scales_equals_the_reference_bit_for_bit(rows, columns, tokens):
    weight, a = packed_weight(rows, columns), activations(tokens, columns)
    configuration = SmallMatmulConfiguration(64, 16, 2, 1, 4, 3)
    assert torch.equal(
        ternary_small_matmul(a, weight, configuration=configuration), reference.ternary_matmul(a, weight)
    )


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("tokens", [7, 64])
def test_small_matmul_with_group_scales_is_within_float32_summation_error(group, tokens):
    weight, a = packed_weight(70, 768, group), activations(tokens, 768, group)
    configuration = SmallMatmulConfiguration(64, 32, 2, 1, 4, 3)
    assert_close(ternary_small_matmul(a, weight, configuration=configuration), a, weight)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splitting_the_inputs_changes_no_bit_of_a_row_scaled_product(splits):
    weight, a = packed_weight(40, 1280), activations(9, 1280)
    configuration = SmallMatmulConfiguration(64, 16, 2, splits, 4, 3)
    assert torch.equal(
        ternary_small_matmul(a, weight, configuration=configuration), reference.ternary_matmul(a, weight)
    )


@pytest.mark.parametrize("group", [64, 128, 256])
def test_splitting_the_inputs_keeps_a_group_scaled_product_within_summation_error_and_repeats_it(group):
    weight, a = packed_weight(40, 1280 if group < 256 else 1536, group), None
    a = activations(9, weight.columns, group)
    configuration = SmallMatmulConfiguration(64, 16, 1, 3, 4, 3)
    once = ternary_small_matmul(a, weight, configuration=configuration)
    assert_close(once, a, weight)
    assert torch.equal(once, ternary_small_matmul(a, weight, configuration=configuration))


@pytest.mark.parametrize("fill", [-1, 0, 1])
@pytest.mark.parametrize("tokens", [1, 4, 6, 70])
def test_constant_weights_give_exact_products(fill, tokens):
    weight, a = packed_weight(5, 512, fill=fill), activations(tokens, 512)
    assert torch.equal(operations.ternary_matmul(a, weight), reference.ternary_matmul(a, weight))


@pytest.mark.parametrize("tokens", [2, 6, 70])
def test_the_largest_activations_on_constant_weights_do_not_overflow_or_round(tokens):
    weight = packed_weight(4, 4096, fill=1)
    a = reference.quantize_activations(torch.full((tokens, 4096), -3.0e30))
    assert torch.equal(operations.ternary_matmul(a, weight), reference.ternary_matmul(a, weight))


@pytest.mark.parametrize("tokens", [1, 6, 70])
def test_zero_activations_give_zero(tokens):
    weight = packed_weight(5, 256)
    y = operations.ternary_matmul(reference.quantize_activations(torch.zeros(tokens, 256)), weight)
    assert torch.equal(y, torch.zeros(tokens, 5))


@pytest.mark.parametrize("tokens", [4, 5, 64, 65])
@pytest.mark.parametrize("group", [None, 128])
def test_every_number_of_tokens_finds_a_kernel_with_the_reference_result(tokens, group):
    weight, a = packed_weight(33 if tokens > 4 else 5, 512, group), activations(tokens, 512, group)
    assert_close(operations.ternary_matmul(a, weight), a, weight)


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("sums_group", [None, 64, 96])
def test_sums_of_another_grouping_than_the_weights_are_converted(tokens, sums_group):
    weight, a = packed_weight(9, 768, 256), activations(tokens, 768, sums_group)
    assert_close(operations.ternary_matmul(a, weight), a, weight)


@pytest.mark.parametrize("tokens", [1, 6, 66])
def test_leading_dimensions_are_kept(tokens):
    weight = packed_weight(5, 256)
    a = reference.quantize_activations(torch.randn(2, 1, tokens, 256, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(operations.ternary_matmul(a, weight), reference.ternary_matmul(a, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 6, 66])
def test_half_precision_outputs_are_the_float32_result_rounded(dtype, tokens):
    weight, a = packed_weight(5, 256), activations(tokens, 256)
    y = operations.ternary_matmul(a, weight, dtype)
    assert y.dtype == dtype
    # The interpreter truncates to bfloat16 where a GPU rounds: one unit in the last place, 2⁻⁷.
    torch.testing.assert_close(y.float(), reference.ternary_matmul(a, weight), rtol=2**-7, atol=1e-6)


def test_a_product_without_tokens_is_empty():
    weight, a = packed_weight(5, 256), activations(0, 256)
    assert operations.ternary_matmul(a, weight).shape == (0, 5)


@pytest.mark.parametrize(("M", "N", "K"), [(1, 17, 128), (33, 65, 200), (127, 40, 384), (5, 130, 96)])
@pytest.mark.parametrize("one_scale", [False, True])
def test_int8_matmul_equals_the_reference_bit_for_bit(M, N, K, one_scale):
    generator = torch.Generator().manual_seed(M)
    a = torch.randint(-127, 128, (M, K), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (N, K), generator=generator, dtype=torch.int8)
    scales = torch.rand(M, 1, generator=generator), torch.rand(1 if one_scale else N, 1, generator=generator)
    configuration = MatmulConfiguration(64, 64, 64, 4, 3, 2)
    assert torch.equal(int8_matmul(a, b, *scales, configuration=configuration), reference.int8_matmul(a, b, *scales))


def test_int8_matmul_takes_rows_that_are_not_contiguous():
    generator = torch.Generator().manual_seed(3)
    wide = torch.randint(-127, 128, (20, 256), generator=generator, dtype=torch.int8)
    a, b = wide[:, 64:192], wide[:9, ::2]
    scales = torch.ones(20, 1), torch.ones(9, 1)
    assert torch.equal(operations.int8_matmul(a, b, *scales), reference.int8_matmul(a, b, *scales))


def test_fp8_matmul_is_the_reference_within_summation_error():
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(33, 256, generator=generator).to(torch.float8_e4m3fn)
    b = torch.randint(-1, 2, (40, 256), generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(33, 1, generator=generator), torch.rand(40, 1, generator=generator)
    y, expected = operations.fp8_matmul(a, b, *scales), reference.fp8_matmul(a, b, *scales)
    magnitude = reference.fp8_matmul(a.float().abs(), b.float().abs(), *scales)
    assert ((y - expected).abs() <= 1e-5 * magnitude).all()


def test_fp8_products_of_small_integers_are_exact():
    generator = torch.Generator().manual_seed(5)
    a = torch.randint(-8, 9, (20, 384), generator=generator).float()
    b = torch.randint(-1, 2, (24, 384), generator=generator).float()
    ones = torch.ones(1, 1)
    y = operations.fp8_matmul(a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), ones, ones)
    assert torch.equal(y, a @ b.T)


def test_scales_of_the_wrong_length_are_refused():
    a = torch.zeros(4, 128, dtype=torch.int8)
    with pytest.raises(ValueError, match="shapes do not fit"):
        scaled_matmul(a, a, torch.ones(3, 1), torch.ones(1, 1), torch.float32, torch.int8)
