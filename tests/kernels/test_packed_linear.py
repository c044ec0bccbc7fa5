"""`packed_linear` of a weight that was quantised and packed, against the dequantised product."""

import pytest
import torch

from nanochat_kernels import packed_linear, quantize_activations, ternarize, ternarize_packed


@pytest.mark.parametrize("granularity", ["row", "tensor", 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_multiplies_with_the_quantised_weight_of_a_linear_layer(granularity, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 256, generator=generator)
    x = torch.randn(2, 5, 256, generator=generator).to(dtype)
    y = packed_linear(x, ternarize_packed(weight, granularity), dtype)
    quantized = quantize_activations(x)
    expected = (quantized.codes * quantized.scale) @ ternarize(weight, granularity).dequantize().T
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_inputs_that_the_layout_does_not_hold_are_refused():
    with pytest.raises(ValueError, match="K = 100 is not a multiple of 128"):
        ternarize_packed(torch.zeros(4, 100))
