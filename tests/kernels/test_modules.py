"""PackedLinear against the dequantised product."""

import pytest
import torch

from nanochat_kernels import PackedLinear, PackedTernary, quantize_activations, ternarize


@pytest.mark.parametrize("granularity", ["row", "tensor", 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_multiplies_with_the_quantised_weight_of_a_linear_layer(granularity, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 256, generator=generator)
    x = torch.randn(2, 5, 256, generator=generator).to(dtype)
    y = PackedLinear.from_weight(weight, granularity)(x)
    quantized = quantize_activations(x)
    expected = (quantized.codes * quantized.scale) @ ternarize(weight, granularity).dequantize().T
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_its_state_is_the_packed_weight_and_can_be_loaded():
    generator = torch.Generator().manual_seed(1)
    layers = [PackedLinear.from_weight(torch.randn(16, 128, generator=generator)) for _ in range(2)]
    assert set(layers[0].state_dict()) == {"packed", "scales"}
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(3, 128, generator=generator)
    assert torch.equal(layers[0](x), layers[1](x))
    assert isinstance(layers[1].weight, PackedTernary)


def test_inputs_that_the_layout_does_not_hold_are_refused():
    with pytest.raises(ValueError, match="K = 100 is not a multiple of 128"):
        PackedLinear.from_weight(torch.zeros(4, 100))
