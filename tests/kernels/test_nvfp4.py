"""NVFP4 in plain torch: a definition in float64 that shares no code with it, and properties that it must have."""

import pytest
import torch

from nanochat_kernels.operations import nvfp4_matmul as dispatched_matmul
from nanochat_kernels.operations import nvfp4_quantize as dispatched_quantize
from nanochat_kernels.reference.nvfp4 import (
    e2m1_values,
    nvfp4_matmul,
    nvfp4_quantize,
    nvfp4_ternary,
    nvfp4_values,
)
from tests.kernels import nvfp4_oracle as oracle


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: torch.Tensor) -> torch.Tensor:
    packed, scale = nvfp4_quantize(x)
    return nvfp4_values(packed).double() * scale.double()


def wide(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Values whose blocks lie orders of magnitude apart, so that block scales of every size occur, 2⁻⁹ included."""
    spread = torch.exp2(normal(rows, columns // 16, seed=seed + 1) * 6).repeat_interleave(16, dim=1)
    return normal(rows, columns, seed=seed) * spread


@pytest.mark.parametrize("x", [normal(64, 256), wide(64, 512), wide(8, 16)], ids=["normal", "wide", "one block"])
def test_codes_and_scales_are_those_of_the_definition_in_float64(x):
    packed, scale = nvfp4_quantize(x)
    codes, blocks, token = oracle.quantize(x)
    found_codes, found_blocks = oracle.unpack(packed)
    assert torch.equal(found_blocks, blocks)
    assert torch.equal(found_codes, codes)
    assert torch.equal(scale.squeeze(1), token)
    assert torch.equal(nvfp4_values(packed).double(), oracle.values(codes, blocks))


def test_the_wide_inputs_of_these_tests_reach_the_smallest_and_the_largest_block_scale():
    blocks = oracle.unpack(nvfp4_quantize(wide(64, 512)).packed)[1]
    assert (blocks.min(), blocks.max()) == (1, 126)


def test_decoding_every_byte_gives_the_numbers_of_the_standard():
    every = torch.arange(256, dtype=torch.uint8)
    signed = torch.cat([oracle.E2M1, -oracle.E2M1])
    expected = torch.stack([signed[every.long() % 16], signed[every.long() // 16]], dim=1).flatten()
    assert torch.equal(e2m1_values(every).double(), expected)
    assert oracle.E2M1.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    torch_e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    assert torch.equal(oracle.E4M3, torch_e4m3)


def test_ties_and_what_lies_beside_them_round_to_the_even_code():
    """With a block whose scale is exactly 1: the token's largest is 2688, elsewhere."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    below, above = (torch.nextafter(ties, torch.tensor(to)) for to in (0.0, 10.0))
    for values, expected in (
        (ties, [0, 1, 1, 2, 2, 4, 4]),
        (below, [0, 0.5, 1, 1.5, 2, 3, 4]),
        (above, [0.5, 1, 1.5, 2, 3, 4, 6]),
    ):
        x = torch.zeros(1, 32)
        x[0, 0], x[0, 16], x[0, 17:24], x[0, 24:31] = 2688.0, 6.0, values, -values
        packed, scale = nvfp4_quantize(x)
        assert scale.item() == 1.0
        found = nvfp4_values(packed)[0, 16:]
        assert found[1:8].tolist() == expected
        assert found[8:15].tolist() == [-value for value in expected]


def test_the_largest_value_of_a_token_is_kept_and_a_block_scale_that_rounds_down_clips():
    x = wide(32, 256)
    largest = x.abs().amax(1).double()
    assert torch.allclose(rounded(x).abs().amax(1), largest, rtol=2**-20)
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = 2688.0, 6 * 1.0624  # 1.0624 rounds down to 1, and 6.37 to 6
    assert rounded(x)[0, 16] == 6.0


def test_rounding_what_is_rounded_changes_nothing():
    """A token scale of 1 is found again; with others x / scale is rounded first, which can move a value to a tie."""
    x = normal(64, 256) * 100
    x[:, 0] = 2688.0
    once = rounded(x).float()
    assert not torch.equal(once, x)
    assert torch.equal(rounded(once).float(), once)


@pytest.mark.parametrize("power", [-60, -1, 1, 60])
def test_a_power_of_two_scales_the_token_and_leaves_its_codes(power):
    x = wide(16, 256)
    one, other = nvfp4_quantize(x), nvfp4_quantize(x * 2.0**power)
    assert torch.equal(one.packed, other.packed)
    assert torch.equal(one.scale * 2.0**power, other.scale)


def test_an_error_is_at_most_a_sixth_of_the_largest_in_its_block_but_for_tiny_blocks():
    """Half of the widest gap, from 4 to 6, and a block scale off by 1 / 16; below 2⁻⁶, by half of 2⁻⁹."""
    x = wide(64, 512)
    token = (x.abs().amax(1, keepdim=True) / 2688).double()
    block = x.unflatten(1, (-1, 16)).abs().amax(2).repeat_interleave(16, dim=1).double()
    bound = torch.maximum(block / 6 * 17 / 16, 6 * 2**-10 * token) * (1 + 2**-20)
    assert ((rounded(x) - x.double()).abs() <= bound).all()


def test_normal_values_are_off_by_nine_to_ten_percent():
    """As in scale tables of four-bit formats; a wrong rounding or block length would be elsewhere."""
    x = normal(256, 1024)
    assert 0.085 < float((rounded(x) - x).norm() / x.norm()) < 0.1


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 2.0**-126])
def test_tokens_of_zeros_and_subnormals_have_finite_scales(value):
    packed, scale = nvfp4_quantize(torch.full((2, 32), value))
    assert (scale > 1e-38).all()
    assert not nvfp4_values(packed).any()
    x = normal(2, 32)
    x[:, 16:] = value
    assert not rounded(x)[:, 16:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_product_of_a_token_that_is_not_finite_is_nan_and_no_other_is(value):
    x, weight = normal(3, 64), nvfp4_ternary(torch.zeros(4, 64))
    x[1, 40] = value
    y = nvfp4_matmul(*nvfp4_quantize(x), weight, torch.ones(4, 1))
    assert y[1].isnan().all()
    assert not y[[0, 2]].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_rounded_as_the_float32_that_they_are(dtype):
    x = normal(8, 128).to(dtype)
    for one, other in zip(nvfp4_quantize(x), nvfp4_quantize(x.float()), strict=True):
        assert torch.equal(one, other)


def test_leading_dimensions_are_kept_and_a_width_without_whole_blocks_is_refused():
    packed, scale = nvfp4_quantize(normal(2, 3, 48))
    assert (packed.shape, scale.shape) == ((2, 3, 27), (2, 3, 1))
    assert nvfp4_values(packed).shape == (2, 3, 48)
    with pytest.raises(ValueError, match="40 inputs"):
        nvfp4_quantize(normal(2, 40))


def test_ternary_weights_are_exact_in_the_codes_that_the_format_names():
    codes = torch.tensor([[-1, 0, 1, 0, 1, -1, 0, 0]], dtype=torch.int8)
    packed = nvfp4_ternary(codes)
    assert packed.tolist() == [[0x0A, 0x02, 0xA2, 0x00]]
    assert torch.equal(e2m1_values(packed), codes.float())


@pytest.mark.parametrize("row_scales", [True, False])
def test_the_product_is_that_of_the_decoded_numbers_rounded_once_before_each_scale(row_scales):
    generator = torch.Generator().manual_seed(5)
    x, weight = wide(9, 128), torch.randint(-1, 2, (24, 128), generator=generator)
    w_scale = torch.rand(24 if row_scales else 1, 1, generator=generator)
    codes, blocks, token = oracle.quantize(x)
    total = (oracle.values(codes, blocks) @ weight.double().T).float()
    expected = (total * token.unsqueeze(1)) * w_scale.T
    found = nvfp4_matmul(*nvfp4_quantize(x), nvfp4_ternary(weight), w_scale)
    assert torch.equal(found, expected)
    assert nvfp4_matmul(*nvfp4_quantize(x), nvfp4_ternary(weight), w_scale, torch.bfloat16).dtype == torch.bfloat16


def test_the_operations_of_the_package_are_the_reference_on_a_cpu():
    x, weight = normal(5, 64), nvfp4_ternary(normal(7, 64).sign())
    one, other = nvfp4_quantize(x), dispatched_quantize(x)
    assert torch.equal(one.packed, other.packed)
    scale = torch.ones(7, 1)
    assert torch.equal(nvfp4_matmul(*one, weight, scale), dispatched_matmul(*other, weight, scale))
