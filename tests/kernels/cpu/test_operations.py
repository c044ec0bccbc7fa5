"""The compiled CPU operations, portable and AVX2, against the reference: integers bit for bit, floats to rounding."""

import pytest
import torch

from nanochat_kernels import PackedTernary, operations
from nanochat_kernels.backends import Unsupported, load
from nanochat_kernels.cpu import native
from nanochat_kernels.reference import activations as reference_activations
from nanochat_kernels.reference import matmul as reference_matmul
from nanochat_kernels.reference.ternarize import Ternary
from nanochat_kernels.reference.ternarize import ternarize as reference_ternarize

SHAPES = [(1, 128), (127, 128), (17, 128), (33, 256), (63, 384), (65, 256), (64, 2048), (40, 4096), (5, 11008)]
GRANULARITIES = ["row", "tensor", 256, 128, 64]
cpu = load("cpu")


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def kernel_set(request):
    try:
        native.select(request.param)
    except Unsupported as reason:
        pytest.skip(str(reason))
    yield request.param
    native.select(None)


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fits(columns: int, granularity: str | int) -> bool:
    return isinstance(granularity, str) or columns % granularity == 0


FITTING = [(*shape, g) for shape in SHAPES for g in GRANULARITIES if fits(shape[1], g)]
UNFIT = [(*shape, g) for shape in SHAPES for g in GRANULARITIES if not fits(shape[1], g)]


@pytest.mark.parametrize(("rows", "columns", "granularity"), UNFIT)
def test_a_scale_that_does_not_divide_the_inputs_is_refused(rows, columns, granularity):
    with pytest.raises(ValueError, match="cannot be split"):
        cpu.ternarize(random(rows, columns, seed=1), granularity)


@pytest.mark.parametrize(("rows", "columns", "granularity"), FITTING)
def test_weights_get_the_codes_and_scales_of_the_reference(rows, columns, granularity):
    weight = random(rows, columns, seed=rows + columns) * torch.logspace(-7, 5, rows).unsqueeze(1)
    weight[0, : columns // 2] = 0
    expected = reference_ternarize(weight, granularity)
    found = cpu.ternarize(weight, granularity)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    packed = cpu.ternarize_packed(weight, granularity)
    assert torch.equal(packed.packed, PackedTernary.pack(expected).packed)
    assert torch.equal(packed.scales, PackedTernary.pack(expected).scales)


def test_a_weight_of_exactly_half_a_scale_becomes_zero_and_the_next_float_one():
    half = torch.tensor(0.5)
    weight = torch.full((1, 128), 1.0)
    weight[0, 0], weight[0, 1], weight[0, 2] = half, torch.nextafter(half, torch.tensor(1.0)), -half
    weight[0, 3:] = (128 - weight[0, :3].abs().sum()) / 125  # the mean, and so the scale, is 1
    expected = reference_ternarize(weight)
    assert expected.scales.item() == 1.0
    assert expected.codes[0, :3].tolist() == [0, 1, 0]
    assert torch.equal(cpu.ternarize(weight).codes, expected.codes)


@pytest.mark.parametrize("group", [None, 64, 128])
@pytest.mark.parametrize("width", [128, 768, 4096])
def test_activations_get_the_codes_scales_and_sums_of_the_reference(width, group):
    x = random(9, width, seed=width) * torch.logspace(-8, 6, 9).unsqueeze(1)
    x[3] = 0
    x[4, 7] = -x[4].abs().amax()
    for found, expected in zip(
        cpu.quantize_activations(x, group), reference_activations.quantize_activations(x, group), strict=True
    ):
        assert torch.equal(found, expected)


def test_values_halfway_between_two_codes_round_to_even_as_in_the_reference():
    x = torch.arange(-127, 128, dtype=torch.float32).repeat(2)[:384] / 2
    x[0] = 127.0
    assert torch.equal(cpu.quantize_activations(x)[0], reference_activations.quantize_activations(x)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_gate_quantise_like_the_reference_except_at_rounding_ties(dtype):
    """The sums of a norm and the exponential differ in the last bits, which changes only codes near a tie."""
    x, up, weight = random(7, 768, seed=2).to(dtype), random(7, 768, seed=3).to(dtype), random(768, seed=4).abs()
    pairs = [
        (cpu.rmsnorm_quantize(x, weight, 1e-5, 128), reference_activations.rmsnorm_quantize(x, weight, 1e-5, 128)),
        (cpu.swiglu_quantize(x, up, 128), reference_activations.swiglu_quantize(x, up, 128)),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found.scale, expected.scale, rtol=1e-6, atol=0)
        difference = (found.codes.int() - expected.codes.int()).abs()
        assert difference.max() <= 1
        assert difference.count_nonzero() <= 3
        assert torch.equal(found.sums, reference_activations.group_sums(found.codes, 128))


def test_the_gate_reads_both_halves_of_a_fused_product_without_a_copy():
    fused = random(5, 2 * 256, seed=5)
    gate, up = fused.chunk(2, dim=-1)
    found = cpu.swiglu_quantize(gate, up)
    expected = cpu.swiglu_quantize(gate.contiguous(), up.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def ternary(rows: int, columns: int, granularity: str | int, seed: int) -> Ternary:
    """Random codes with every value, and scales that differ in each group."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    groups = columns // granularity if isinstance(granularity, int) else 1
    scales = torch.rand(1 if granularity == "tensor" else rows, groups, generator=generator) + 0.01
    return Ternary(codes, scales.half().float(), granularity)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 65])
@pytest.mark.parametrize(("rows", "columns", "granularity"), FITTING)
def test_a_product_equals_the_reference(rows, columns, tokens, granularity):
    weight = PackedTernary.pack(ternary(rows, columns, granularity, seed=rows))
    activations = cpu.quantize_activations(random(tokens, columns, seed=tokens), weight.group)
    found = cpu.ternary_matmul(activations, weight)
    assert torch.equal(cpu.packed_linear(random(tokens, columns, seed=tokens), weight), found)
    expected = reference_matmul.ternary_matmul(activations, weight)
    if granularity in ("row", "tensor"):
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("tokens", [1, 9])
def test_the_largest_possible_sums_do_not_overflow(tokens):
    """All codes 1, or −1, times all activations ±127, over more inputs than 16 bits could sum."""
    columns = 11008
    for code in (-1, 1):
        weight = PackedTernary.pack(Ternary(torch.full((3, columns), code, dtype=torch.int8), torch.ones(3, 1), "row"))
        for sign in (-1, 1):
            x = cpu.quantize_activations(torch.full((tokens, columns), float(sign)))
            y = cpu.ternary_matmul(x._replace(scale=torch.ones(tokens, 1)), weight)
            assert (y == code * sign * 127 * columns).all()


def test_zero_weights_and_zero_activations_give_exact_zeros():
    weight = PackedTernary.pack(Ternary(torch.zeros(9, 256, dtype=torch.int8), torch.ones(9, 1), "row"))
    assert not cpu.ternary_matmul(cpu.quantize_activations(random(9, 256, seed=6)), weight).any()
    weight = PackedTernary.pack(ternary(9, 256, 128, seed=7))
    assert not cpu.ternary_matmul(cpu.quantize_activations(torch.zeros(9, 256), 128), weight).any()


def test_sums_of_another_grouping_are_regrouped():
    weight = PackedTernary.pack(ternary(33, 512, 256, seed=8))
    x = random(4, 512, seed=9)
    expected = cpu.ternary_matmul(cpu.quantize_activations(x, 256), weight)
    assert torch.equal(cpu.ternary_matmul(cpu.quantize_activations(x, 64), weight), expected)
    assert torch.equal(cpu.ternary_matmul(cpu.quantize_activations(x), weight), expected)


def test_int8_products_are_exact_over_the_whole_range():
    generator = torch.Generator().manual_seed(10)
    a = torch.randint(-128, 128, (7, 393), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (70, 393), generator=generator, dtype=torch.int8)
    a[0], b[0] = -128, -128
    a_scale, b_scale = torch.rand(7, 1, generator=generator), torch.rand(70, 1, generator=generator)
    assert torch.equal(cpu.int8_matmul(a, b, a_scale, b_scale), reference_matmul.int8_matmul(a, b, a_scale, b_scale))
    one = torch.ones(1, 1)
    assert torch.equal(cpu.int8_matmul(a, b, a_scale, one), reference_matmul.int8_matmul(a, b, a_scale, one))


def test_unpacking_returns_the_codes_and_refuses_code_3():
    matrix = ternary(17, 384, "row", seed=11)
    packed = PackedTernary.pack(matrix)
    assert torch.equal(cpu.unpack(packed), matrix.codes)
    assert torch.equal(cpu.unpack(packed, torch.bfloat16), matrix.codes.bfloat16())
    packed.packed[16, 95] |= 0b11000000
    with pytest.raises(ValueError, match="invalid code 3"):
        cpu.unpack(packed)


def test_unsupported_operations_fall_back_to_the_reference(caplog):
    x = random(2, 100, seed=12)
    with pytest.raises(Unsupported, match="multiples of 32"):
        cpu.quantize_activations(x)
    found = operations.quantize_activations(x, backend="cpu")
    assert torch.equal(found.codes, reference_activations.quantize_activations(x).codes)
