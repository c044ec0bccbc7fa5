"""The reference products against integer arithmetic in Python and float64."""

import numpy as np
import pytest
import torch

from nanochat_kernels import PackedTernary, Ternary, fp8_matmul, int8_matmul, quantize_activations, ternary_matmul
from nanochat_kernels.reference.matmul import integer_product


def test_the_integer_part_is_exact_at_the_extremes():
    a = torch.tensor([[127] * 11008, [-127] * 11008, [0] * 11008], dtype=torch.int8)
    b = torch.tensor([[1] * 11008, [-127] * 11008], dtype=torch.int8)
    expected = a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T
    np.testing.assert_array_equal(integer_product(a, b).numpy(), expected)


def test_the_float_part_is_one_product_with_each_scale_in_float32():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (5, 200), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (7, 200), generator=generator, dtype=torch.int8)
    a_scale, b_scale = torch.rand(5, 1, generator=generator), torch.rand(7, 1, generator=generator)
    found = int8_matmul(a, b, a_scale, b_scale, backend="reference")
    for m in range(5):
        for n in range(7):
            dot = sum(int(x) * int(y) for x, y in zip(a[m].tolist(), b[n].tolist(), strict=True))
            expected = np.float32(np.float32(dot) * np.float32(a_scale[m])) * np.float32(b_scale[n])
            assert found[m, n].item() == np.float32(expected)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_ternary_product_is_that_of_the_dequantised_matrices(groups):
    generator = torch.Generator().manual_seed(groups)
    codes = torch.randint(-1, 2, (33, 512), generator=generator, dtype=torch.int8)
    matrix = Ternary(codes, (torch.rand(33, groups, generator=generator) + 0.1).half().float(), "row")
    x = quantize_activations(torch.randn(2, 3, 512, generator=generator), backend="reference")
    expected = (x.codes.double() * x.scale.double()) @ matrix.dequantize().double().T
    found = ternary_matmul(x, PackedTernary.pack(matrix), backend="reference")
    assert found.shape == (2, 3, 33)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


def test_float8_products_are_those_of_the_values():
    generator = torch.Generator().manual_seed(9)
    a = torch.randn(4, 64, generator=generator).to(torch.float8_e4m3fn)
    b = torch.randint(-1, 2, (6, 64), generator=generator).float().to(torch.float8_e4m3fn)
    scales = torch.rand(4, 1, generator=generator), torch.rand(6, 1, generator=generator)
    expected = (a.double() * scales[0]) @ (b.double() * scales[1]).T
    torch.testing.assert_close(fp8_matmul(a, b, *scales).double(), expected, rtol=1e-5, atol=1e-5)
