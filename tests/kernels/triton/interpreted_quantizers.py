"""Quantisers of weights and activations, and unpacking: integers and scales equal the reference."""

import pytest
import torch

from nanochat_kernels import PackedTernary, Ternary
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.reference import operations as reference
from nanochat_kernels.triton_kernels import operations
from nanochat_kernels.triton_kernels.configurations import TernarizeConfiguration
from nanochat_kernels.triton_kernels.ternarize import ternarize_forms
from nanochat_kernels.triton_kernels.unpack import unpack_effective

SHAPES = [(31, 128), (1, 4096), (9, 256), (13, 384)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TIE = 1e-3


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def assert_equal_except_at_ties(actual, expected, exact: torch.Tensor) -> None:
    """exact: what was quantised, in float64. A code may differ by one where exact / scale lies within 1e-3 of a tie."""
    torch.testing.assert_close(actual.scale, expected.scale, rtol=1e-6, atol=0)
    ratio = (exact / expected.scale.double()).abs()
    near_tie = (ratio - ratio.floor() - 0.5).abs() < TIE
    difference = (actual.codes.int() - expected.codes.int()).abs()
    assert difference.max() <= 1
    assert not ((difference > 0) & ~near_tie).any()
    groups = actual.sums.shape[-1]
    assert torch.equal(
        actual.sums, actual.codes.reshape(*actual.codes.shape[:-1], groups, -1).sum(-1, dtype=torch.int32)
    )


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("granularity", ["row", "tensor", 128, 64])
def test_ternarised_codes_and_scales_equal_the_reference_bit_for_bit(rows, columns, granularity):
    weight = normal(rows, columns, seed=rows)
    actual, expected = operations.ternarize(weight, granularity), reference.ternarize(weight, granularity)
    assert torch.equal(actual.scales, expected.scales)
    assert torch.equal(actual.codes, expected.codes)
    assert actual.granularity == granularity


@pytest.mark.parametrize("granularity", ["row", "tensor", 128])
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e7])
def test_scales_are_clamped_to_what_float16_holds(granularity, scale):
    weight = normal(9, 256, seed=4, scale=scale)
    actual, expected = operations.ternarize(weight, granularity), reference.ternarize(weight, granularity)
    assert torch.equal(actual.scales, expected.scales)
    assert torch.equal(actual.codes, expected.codes)


@pytest.mark.parametrize("value", [0.0, -1.0, 0.375])
def test_constant_weights_ternarise_as_the_reference_does(value):
    weight = torch.full((5, 256), value)
    assert torch.equal(operations.ternarize(weight).codes, reference.ternarize(weight).codes)
    assert torch.equal(operations.ternarize(weight).scales, reference.ternarize(weight).scales)


def test_magnitudes_of_exactly_half_the_scale_become_zero():
    """Half of the row is ±1/2 and half ±3/2: s = 1, and 1/2 rounds half to even."""
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5] * 32])
    ternary = operations.ternarize(weight)
    assert ternary.scales.item() == 1.0
    assert torch.equal(ternary.codes, torch.tensor([[0, 0, 1, -1] * 32], dtype=torch.int8))


@pytest.mark.parametrize("granularity", ["row", "tensor", 128])
@pytest.mark.parametrize(("rows", "columns"), [(9, 256), (1, 1024), (6, 384)])
def test_all_forms_of_the_codes_agree(granularity, rows, columns):
    weight = normal(rows, columns, seed=5)
    forms = ternarize_forms(weight, granularity, packed=True)
    expected = PackedTernary.pack(reference.ternarize(weight, granularity))
    assert torch.equal(forms.packed, expected.packed)
    assert torch.equal(forms.codes, expected.ternary().codes)
    packed = operations.ternarize_packed(weight, granularity)
    assert torch.equal(packed.packed, expected.packed)
    assert torch.equal(packed.scales, expected.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_weights_refreshed_together_hold_what_the_reference_gives_each(dtype):
    """Two of one shape, which share a launch, one that is too narrow for planes, and one that is packed too."""
    latents = [normal(*shape, seed=i) for i, shape in enumerate([(6, 256), (3, 100), (6, 256), (5, 640)])]
    held = [
        (
            torch.empty(len(w), 1),
            torch.empty(w.shape, dtype=dtype),
            torch.empty(5, 160, dtype=torch.uint8) if i == 3 else None,
        )
        for i, w in enumerate(latents)
    ]
    expected = [tuple(None if t is None else t.clone() for t in own) for own in held]
    operations.ternarize_rows(latents, *zip(*held, strict=True))
    reference.ternarize_rows(latents, *zip(*expected, strict=True))
    for own, right in zip(held, expected, strict=True):
        for tensor, other in zip(own, right, strict=True):
            assert tensor is other is None or torch.equal(tensor, other)


def test_weights_that_a_table_of_addresses_cannot_hold_are_unsupported():
    latent, scale = normal(4, 256), torch.empty(4, 1)
    for operand in (torch.empty(256, 4).T, torch.empty(4 * 256 + 1)[1:].view(4, 256)):
        with pytest.raises(Unsupported, match="contiguous"):
            operations.ternarize_rows([latent], [scale], [operand], [None])


def test_a_tensor_scale_from_many_partial_sums_equals_the_reference():
    weight = normal(40, 1000, seed=6)
    configuration = TernarizeConfiguration(block=256, partial=1024, rows=64, blocks=2)
    forms = ternarize_forms(weight, "tensor", configuration=configuration)
    expected = reference.ternarize(weight, "tensor")
    assert torch.equal(forms.scales, expected.scales)
    assert torch.equal(forms.codes, expected.codes)


@pytest.mark.parametrize("columns", [100, 200, 320])
def test_widths_that_are_not_multiples_of_128_ternarise_but_do_not_pack(columns):
    weight = normal(6, columns, seed=7)
    assert torch.equal(operations.ternarize(weight).codes, reference.ternarize(weight).codes)
    with pytest.raises(ValueError, match="multiple of 128"):
        operations.ternarize_packed(weight)


def test_a_group_that_does_not_divide_the_row_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"200 inputs .* 128"):
        operations.ternarize(torch.zeros(2, 200), 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns", "group"), [(1, 4096, None), (3, 384, 128), (7, 768, 64), (2, 200, 40)])
def test_quantised_activations_equal_the_reference_bit_for_bit(dtype, tokens, columns, group):
    x = normal(tokens, columns, seed=tokens, scale=3.0).to(dtype)
    actual, expected = operations.quantize_activations(x, group), reference.quantize_activations(x, group)
    for name in ("codes", "scale", "sums"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-6, 1e30])
def test_extreme_and_zero_activations_quantise_as_the_reference_does(magnitude):
    x = normal(4, 256, seed=8) * magnitude
    actual, expected = operations.quantize_activations(x), reference.quantize_activations(x)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.scale, expected.scale)


def test_ties_round_to_even_as_in_the_reference():
    x = torch.arange(-127, 128).float().repeat(2)[:508].reshape(2, 254) / 2
    x[:, 0] = 127.0
    assert torch.equal(operations.quantize_activations(x).codes, reference.quantize_activations(x).codes)


def test_rows_that_are_not_contiguous_and_leading_dimensions_are_kept():
    x = normal(2, 3, 512, seed=9)[..., 128:384]
    actual, expected = operations.quantize_activations(x, 128), reference.quantize_activations(x, 128)
    for name in ("codes", "scale", "sums"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns", "group"), [(5, 768, 128), (2, 1000, None)])
def test_rmsnorm_and_quantisation_equal_the_reference_except_at_ties(dtype, tokens, columns, group):
    x, weight = normal(tokens, columns, seed=10).to(dtype), normal(columns, seed=11).to(dtype)
    h = x.double()
    exact = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    actual = operations.rmsnorm_quantize(x, weight, 1e-6, group)
    assert_equal_except_at_ties(actual, reference.rmsnorm_quantize(x, weight, 1e-6, group), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns", "group"), [(5, 768, 128), (2, 1000, None)])
def test_swiglu_and_quantisation_equal_the_reference_except_at_ties(dtype, tokens, columns, group):
    gate, up = normal(tokens, columns, seed=12, scale=4.0).to(dtype), normal(tokens, columns, seed=13).to(dtype)
    exact = torch.nn.functional.silu(gate.double()) * up.double()
    actual = operations.swiglu_quantize(gate, up, group)
    assert_equal_except_at_ties(actual, reference.swiglu_quantize(gate, up, group), exact)


def test_a_token_too_wide_for_one_program_is_unsupported_with_its_width():
    with pytest.raises(Unsupported, match="40000"):
        operations.quantize_activations(torch.zeros(1, 40000))


def test_quantising_no_tokens_gives_no_codes():
    assert operations.quantize_activations(torch.zeros(0, 128)).codes.shape == (0, 128)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize(("rows", "columns"), [(33, 256), (1, 4096), (65, 384)])
def test_unpacked_codes_equal_the_reference(dtype, rows, columns):
    weight = PackedTernary.pack(reference.ternarize(normal(rows, columns, seed=14)))
    actual, expected = operations.unpack(weight, dtype), reference.unpack(weight, dtype)
    assert actual.dtype == dtype
    assert torch.equal(actual.float(), expected.float())


@pytest.mark.parametrize("granularity", ["row", "tensor", 64, 128, 384])
def test_the_effective_weight_in_float16_is_exactly_codes_times_scales(granularity):
    ternary = reference.ternarize(normal(21, 768, seed=15), granularity)
    assert torch.equal(unpack_effective(PackedTernary.pack(ternary)).float(), ternary.dequantize())


@pytest.mark.parametrize("group", [32, 192])
def test_groups_that_the_bytes_do_not_align_with_are_unsupported_by_the_decode_kernels(group):
    scales = torch.ones(4, 384 // group)
    weight = PackedTernary.pack(Ternary(torch.ones(4, 384, dtype=torch.int8), scales, group))
    with pytest.raises(Unsupported, match=f"groups of {group}"):
        operations.ternary_matmul(reference.quantize_activations(torch.ones(1, 384)), weight)
