"""NVFP4: the quantizer equals the reference bit for bit, the product's twin up to the order of a float32 sum."""

import pytest
import torch

from nanochat_kernels.reference import nvfp4 as reference
from nanochat_kernels.triton_kernels import operations

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GPU_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()
"""What a GPU computes where a CPU has 0x7FC00000."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(x: torch.Tensor) -> None:
    actual, expected = operations.nvfp4_quantize(x), reference.nvfp4_quantize(x)
    assert torch.equal(actual.packed, expected.packed)
    assert torch.equal(actual.scale.nan_to_num(-1.0), expected.scale.nan_to_num(-1.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "columns"), [(5, 768), (3, 400), (9, 16), (2, 4096)])
def test_codes_and_scales_equal_the_reference_bit_for_bit(dtype, tokens, columns):
    spread = torch.exp2(normal(tokens, columns // 16, seed=1) * 4).repeat_interleave(16, dim=1)
    assert_same((normal(tokens, columns) * spread).to(dtype))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 3e38, float("inf"), float("-inf"), float("nan"), GPU_NAN])
def test_zeros_subnormals_and_what_is_not_finite_equal_the_reference(value):
    x = normal(3, 64)
    x[0], x[1, 5], x[2, 16:32] = value, value, value
    assert_same(x)
    assert_same(-x)


def test_ties_of_codes_and_of_block_scales_equal_the_reference():
    x = torch.arange(-48, 48).float().repeat(1, 4).reshape(4, 96) / 8
    x[:, 0] = 2688.0  # the token's scale is 1
    x[1:, 16:] *= torch.tensor([[1.0625], [1.1875], [2**-8]])  # halfway between block scales, and below the smallest
    assert_same(x)


def test_rows_apart_and_leading_dimensions_are_taken():
    assert_same(normal(2, 3, 512)[..., 128:384])
    assert_same(torch.zeros(0, 32))


@pytest.mark.parametrize(
    ("tokens", "outputs", "columns", "dtype"),
    [
        (5, 7, 64, torch.bfloat16),
        (130, 136, 256, torch.float32),
        (1, 1, 400, torch.float16),
        (3, 65, 272, torch.float32),
    ],
)
def test_products_equal_the_reference_up_to_rounding_of_their_sum(tokens, outputs, columns, dtype):
    generator = torch.Generator().manual_seed(2)
    weight = reference.nvfp4_ternary(torch.randint(-1, 2, (outputs, columns), generator=generator))
    activations = reference.nvfp4_quantize(normal(tokens, columns))
    for scale in (torch.rand(outputs, 1, generator=generator), torch.full((1, 1), 0.25)):
        actual, expected = (
            module.nvfp4_matmul(*activations, weight, scale, dtype).double() for module in (operations, reference)
        )
        largest = reference.nvfp4_values(activations.packed).abs().sum(1, keepdim=True) * activations.scale * scale.T
        assert ((actual - expected).abs() <= largest * (2**-20 if dtype == torch.float32 else 2**-7)).all()


def test_products_whose_sums_float32_holds_equal_the_reference_bit_for_bit():
    """With one block scale everywhere a sum is a multiple of half of it."""
    x = torch.randint(-12, 13, (17, 512), generator=torch.Generator().manual_seed(3)) / 2.0
    x[:, ::16] = 6.0
    weight = reference.nvfp4_ternary(normal(40, 512, seed=4).round().clamp(-1, 1))
    activations, scale = reference.nvfp4_quantize(x), normal(40, 1).abs()
    actual, expected = (module.nvfp4_matmul(*activations, weight, scale) for module in (operations, reference))
    assert torch.equal(actual, expected)


def test_operands_that_do_not_fit_are_refused_with_their_shapes():
    activations = reference.nvfp4_quantize(normal(2, 64))
    with pytest.raises(ValueError, match=r"\[2, 36\] · \[4, 24\]"):
        operations.nvfp4_matmul(*activations, torch.zeros(4, 24, dtype=torch.uint8), torch.ones(4, 1))
    with pytest.raises(ValueError, match="40 inputs"):
        operations.nvfp4_quantize(normal(2, 40))
