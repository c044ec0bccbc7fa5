"""PackedTernary: packing, bytes of other origin, and stacked matrices."""

import pytest
import torch

from nanochat_kernels import PackedTernary, Ternary, quantize_activations, ternary_matmul


def ternary(rows: int, columns: int, groups: int, seed: int) -> Ternary:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    scales = (torch.rand(rows, groups, generator=generator) + 0.01).half().float()
    return Ternary(codes, scales, "row" if groups == 1 else columns // groups)


def test_codes_and_scales_come_back():
    for groups in (1, 4):
        matrix = ternary(9, 512, groups, seed=groups)
        back = PackedTernary.pack(matrix).ternary()
        assert torch.equal(back.codes, matrix.codes)
        assert torch.equal(back.scales, matrix.scales)
        assert torch.equal(back.dequantize(), matrix.dequantize())


def test_one_scale_for_all_is_repeated_for_every_row():
    matrix = Ternary(torch.ones(3, 128, dtype=torch.int8), torch.full((1, 1), 0.5), "tensor")
    packed = PackedTernary.pack(matrix)
    assert packed.scales.tolist() == [[0.5]] * 3
    assert torch.equal(packed.ternary().dequantize(), matrix.dequantize())


def test_its_memory_is_two_bits_a_weight_and_the_scales():
    packed = PackedTernary.pack(ternary(64, 512, 1, seed=1))
    assert packed.bytes == 64 * 512 // 4 + 64 * 4


def test_bytes_of_another_origin_are_checked():
    packed = PackedTernary.pack(ternary(4, 256, 2, seed=2))
    same = PackedTernary.from_bytes(packed.packed, packed.scales, 256)
    assert torch.equal(same.packed, packed.packed)
    for columns, scales, message in (
        (128, packed.scales, "do not hold rows of 128"),
        (256, packed.scales[:3], r"scales of shape \[3, 2\] do not fit 4 rows"),
        (256, torch.ones(4, 3), "do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            PackedTernary.from_bytes(packed.packed, scales, columns)
    for position in range(4):
        damaged = packed.packed.clone()
        damaged[3, 63] |= 0b11 << 2 * position
        with pytest.raises(ValueError, match="invalid code 3"):
            PackedTernary.from_bytes(damaged, packed.scales, 256)


def test_the_product_of_stacked_matrices_is_the_stacked_products():
    parts = [ternary(5, 256, 1, seed=3), ternary(7, 256, 2, seed=4), ternary(1, 256, 1, seed=5)]
    packed = [PackedTernary.pack(part) for part in parts]
    together = PackedTernary.concatenate(packed)
    assert (together.rows, together.n_groups) == (13, 2)
    x = quantize_activations(torch.randn(3, 256, generator=torch.Generator().manual_seed(6)))
    expected = torch.cat([ternary_matmul(x, part, backend="reference") for part in packed], dim=-1)
    torch.testing.assert_close(ternary_matmul(x, together, backend="reference"), expected, rtol=1e-6, atol=1e-5)


def test_matrices_with_different_inputs_are_not_stacked():
    with pytest.raises(ValueError, match=r"K = \[128, 256\]"):
        PackedTernary.concatenate([PackedTernary.pack(ternary(2, k, 1, seed=k)) for k in (128, 256)])
