"""Ternarisation against a scalar-by-scalar oracle in Python floats."""

import numpy as np
import pytest
import torch

from nanochat_kernels import PackedTernary, fake_ternarize, ternarize, ternarize_rows

GRANULARITIES = ["row", "tensor", 256, 128, 64]


def oracle(weight: np.ndarray, granularity: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and element scales by the definition, one group at a time, in float64 with float16 scales."""
    rows, columns = weight.shape
    codes, scales = np.zeros((rows, columns), dtype=np.int8), np.zeros((rows, columns))
    group = columns if granularity in ("row", "tensor") else int(granularity)
    for row in range(rows):
        for start in range(0, columns, group):
            piece = slice(start, start + group)
            mean = (
                np.abs(weight.astype(np.float64)).mean()
                if granularity == "tensor"
                else np.abs(weight[row, piece].astype(np.float64)).mean()
            )
            scale = float(np.float16(np.float32(max(mean, 1e-5))))
            for column in range(start, start + group):
                ratio = np.float32(weight[row, column]) / np.float32(scale)
                codes[row, column] = int(np.clip(np.round(ratio), -1, 1))
            scales[row, piece] = scale
    return codes, scales


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("seed", [0, 1])
def test_codes_and_scales_equal_the_scalar_definition(granularity, seed):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed * 3 - 3)
    codes, scales = oracle(weight.numpy(), granularity)
    ternary = ternarize(weight, granularity)
    # The float32 mean may round to the neighbouring float16: allow one ulp of scale, and then no code may differ
    # except where |w| is within that ulp of a threshold.
    np.testing.assert_allclose(ternary.element_scales().numpy(), scales, rtol=2**-10)
    differing = ternary.codes.numpy() != codes
    near = np.abs(np.abs(weight.numpy()) / scales - 0.5) < 2e-3
    assert not (differing & ~near).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_scale_survives_float16_unchanged(granularity):
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(3))
    scales = ternarize(weight, granularity).scales
    assert torch.equal(scales.half().float(), scales)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_fused_form_equals_codes_times_scales_bit_for_bit(granularity):
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(4))
    assert torch.equal(fake_ternarize(weight, granularity), ternarize(weight, granularity).dequantize())


def test_an_all_zero_matrix_has_zero_codes_and_a_positive_scale():
    ternary = ternarize(torch.zeros(4, 256), "row")
    assert not ternary.codes.any()
    assert (ternary.scales > 0).all()


def test_a_constant_matrix_is_exactly_itself():
    weight = torch.full((4, 256), -0.5)
    assert torch.equal(ternarize(weight, "row").dequantize(), weight)


def test_a_group_that_does_not_divide_the_row_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"200 inputs .* 128"):
        ternarize(torch.zeros(2, 200), 128)


def test_requantising_an_effective_weight_would_shrink_its_scale():
    """Why codes are exported directly: the second scale is the first times the non-zero fraction."""
    weight = torch.randn(1, 4096, generator=torch.Generator().manual_seed(5))
    once = ternarize(weight, "row")
    twice = ternarize(once.dequantize(), "row")
    nonzero = once.codes.ne(0).float().mean()
    assert float(twice.scales / once.scales) == pytest.approx(float(nonzero), rel=1e-3)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_several_weights_are_held_in_is_refreshed_in_place(backend):
    latents = [torch.randn(n, 256, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 7)]
    scales, packed = [torch.empty(n, 1) for n in (3, 5, 7)], [None, torch.empty(5, 64, dtype=torch.uint8), None]
    operands = [torch.empty(3, 256, dtype=torch.bfloat16), *(torch.empty(n, 256, dtype=torch.int8) for n in (5, 7))]
    ternarize_rows(latents, scales, operands, packed, backend=backend)
    for latent, scale, operand in zip(latents, scales, operands, strict=True):
        assert torch.equal(scale, ternarize(latent).scales)
        assert torch.equal(operand.to(torch.int8), ternarize(latent).codes)
    assert torch.equal(packed[1], PackedTernary.pack(ternarize(latents[1])).packed)
