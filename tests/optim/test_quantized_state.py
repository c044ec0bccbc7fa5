"""State in 8 bits against error bounds, its own definition written out, and updates with exact state."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat_cli.optim.adamw import AdamW, AdamW8bit
from nanochat_cli.optim.lion import Lion
from nanochat_cli.optim.muon import Muon
from nanochat_cli.optim.quantized_state import (
    QuantizedState,
    dequantize,
    dynamic_map,
    make_state,
    nearest,
    quantize_into,
)

CPU = torch.device("cpu")


def stored(values, code, block):
    """values: [items, ...], through the state and back; and the scales."""
    state = QuantizedState(len(values), tuple(values.shape[1:]), CPU, code, block)
    state.write(slice(None), values)
    return state.read(slice(None)), state


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    items=st.integers(1, 3),
    size=st.integers(1, 700),
    block=st.sampled_from([128, 256]),
    exponent=st.integers(-30, 30),
)
def test_linear_error_is_at_most_half_a_step_of_the_block(seed, items, size, block, exponent):
    values = torch.randn(items, size, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    result, _ = stored(values, "linear", block)
    for ours, exact in zip(result, values, strict=True):
        for a, b in zip(ours.split(block), exact.split(block), strict=True):
            step = b.abs().max() / 127
            assert (a - b).abs().max() <= step * (0.5 + 1e-4)  # 1e-4: float32 rounding of x / step, x up to 127 steps
            assert a.abs().max() == pytest.approx(float(b.abs().max()), rel=1e-6)


def test_linear_values_are_stored_again_as_the_same_codes():
    values = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(1))
    once, state = stored(values, "linear", 128)
    _, again = stored(once, "linear", 128)
    assert torch.equal(state.codes, again.codes)
    torch.testing.assert_close(state.scales, again.scales, rtol=3e-7, atol=0)


@pytest.mark.parametrize("code", ["linear", "dynamic", "unsigned"])
def test_zeros_stay_zeros_and_denormals_finite(code):
    fresh = make_state(2, (300,), CPU, code, 128)
    assert torch.equal(fresh.read(slice(None)), torch.zeros(2, 300))
    result, _ = stored(torch.zeros(2, 300), code, 128)
    assert torch.equal(result, torch.zeros(2, 300))
    result, _ = stored(torch.full((1, 128), 1e-42), code, 128)
    assert result.isfinite().all()


def test_the_dynamic_maps_are_256_ascending_values_from_the_paper():
    signed, unsigned = dynamic_map(signed=True), dynamic_map(signed=False)
    for values in (signed, unsigned):
        assert len(set(values)) == 256
        assert values[-1] == 1.0
        assert 0.0 in values
    # each decade has its fraction steps' midpoints: 64 (signed) and 128 between 0.1 and 1
    assert sum(0.1 < v < 1 for v in signed) == 64
    assert sum(0.1 < v < 1 for v in unsigned) == 128
    assert min(v for v in unsigned if v > 0) == pytest.approx(1e-6 * (0.1 + 0.45 / 2))


@pytest.mark.parametrize("code", ["dynamic", "unsigned"])
def test_a_dynamic_code_is_the_nearest_value_of_the_map(code):
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(2)) ** 3
    values = values.abs() if code == "unsigned" else values
    result, state = stored(values, code, 256)
    table = torch.tensor(dynamic_map(signed=code == "dynamic"))
    table = table[1:] if code == "unsigned" else table  # only zero itself becomes zero
    for row, exact, scale in zip(result, values, state.scales[:, 0], strict=True):
        distance = (exact[:, None] - table * scale).abs()
        torch.testing.assert_close((exact - row).abs(), distance.min(dim=1).values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("code", ["dynamic", "unsigned"])
def test_places_are_those_of_a_binary_search(code):
    table = torch.tensor(dynamic_map(signed=code == "dynamic"), dtype=torch.float64)
    boundaries = ((table[1:] + table[:-1]) / 2).float()
    around = [torch.nextafter(boundaries, torch.tensor(end)) for end in (-2.0, 2.0)]
    spread = torch.rand(100_000, generator=torch.Generator().manual_seed(9)) ** 8
    values = torch.cat([boundaries, *around, spread, table.float(), torch.tensor([0.0, 1e-45, 1e-38])])
    values = torch.cat([values, -values]) if code == "dynamic" else values
    assert torch.equal(nearest(values, code).long(), torch.bucketize(values, boundaries))


def test_a_positive_second_moment_never_becomes_zero():
    values = torch.tensor([[1.0, 1e-20, 0.0, 3e-8] + [0.5] * 124])
    result, _ = stored(values, "unsigned", 128)
    assert result[0, 1] > 0
    assert result[0, 3] > 0
    assert result[0, 2] == 0


def test_codes_and_scales_take_part_of_the_storage():
    codes, scales = torch.zeros(4, 128, dtype=torch.int8), torch.zeros(4)
    blocks = torch.randn(2, 128, generator=torch.Generator().manual_seed(3))
    quantize_into(blocks, codes[1:3], scales[1:3], "linear")
    assert (codes[[0, 3]] == 0).all()
    expected = torch.round(blocks / (blocks.abs().amax(1, keepdim=True) / 127))
    assert (codes[1:3].float() - expected).abs().max() <= 1  # a tie may fall either way
    torch.testing.assert_close(dequantize(codes, scales, "linear")[1:3], blocks, rtol=0, atol=0.02)


def parameters(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [(f"w{i}", torch.nn.Parameter(torch.randn(*shape, generator=generator))) for i, shape in enumerate(shapes)]


def give_gradients(pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in pairs:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_an_8_bit_muon_step_is_the_exact_step_from_the_state_it_read_and_stores_the_exact_momentum():
    shapes = [(32, 64), (32, 64), (96, 32)]
    ours, exact = parameters(shapes, 4), parameters(shapes, 4)
    quantised, whole = Muon(ours, state_block=128), Muon(exact)
    for step in range(3):
        for shape, state in quantised.buffers.items():  # the exact optimizer starts from the other one's state
            whole.buffers[shape].write(slice(None), state.read(slice(None)))
        give_gradients(ours, step)
        give_gradients(exact, step)
        quantised.step(0.02)
        whole.step(0.02)
        for (_, a), (_, b) in zip(ours, exact, strict=True):
            assert torch.equal(a, b)
        for shape, state in quantised.buffers.items():
            expected, _ = stored(whole.buffers[shape].read(slice(None)), "linear", 128)
            assert torch.equal(state.read(slice(None)), expected)


@pytest.mark.parametrize("shape", [(64, 80), (4096,), (70, 61)])
def test_an_8_bit_lion_step_is_the_exact_step_from_the_state_it_read(shape):
    ours, exact = parameters([shape], 5), parameters([shape], 5)
    quantised, whole = Lion(ours, weight_decay=0.1, state_block=256), Lion(exact, weight_decay=0.1)
    for step in range(3):
        values = quantised.momentum[0].read(slice(None)).reshape(-1)[: ours[0][1].numel()]
        whole.momentum[0].write(slice(None), values.reshape(1, *shape))
        give_gradients(ours, step)
        give_gradients(exact, step)
        quantised.step(0.01)
        whole.step(0.01)
        assert torch.equal(ours[0][1], exact[0][1])


@pytest.mark.parametrize(("weight_decay", "eps"), [(0.0, 1e-10), (0.1, 1e-10), (0.0, 0.5)])
def test_8_bit_adamw_equals_torch_where_the_state_is_whole_and_follows_it_where_it_is_not(weight_decay, eps):
    shapes = [(63,), (128, 72)]  # the first has too few elements to be quantised
    ours, exact = parameters(shapes, 6), parameters(shapes, 6)
    options = {"betas": (0.8, 0.95), "eps": eps, "weight_decay": weight_decay}
    quantised, whole = AdamW8bit(ours, **options, state_block=256), AdamW(exact, **options)
    for step in range(10):
        give_gradients(ours, step)
        give_gradients(exact, step)
        quantised.step(0.01)
        whole.step(0.01)
    torch.testing.assert_close(ours[0][1], exact[0][1], rtol=1e-5, atol=1e-6)
    start = parameters(shapes, 6)[1][1]
    moved, error = (exact[1][1] - start).norm(), (ours[1][1] - exact[1][1]).norm()
    assert error < 0.02 * moved  # a dynamic code has 2 or 3 digits; the errors of ten steps are independent


def test_small_parameters_keep_whole_state_and_large_ones_one_byte_per_element():
    lion = Lion(parameters([(4095,), (64, 64), (100, 100)], 7), state_block=256)
    assert [sum(t.numel() * t.element_size() for t in state.tensors()) for state in lion.momentum] == [
        4 * 4095,
        4096 + 4 * 16,
        40 * 256 + 4 * math.ceil(10_000 / 256),  # the last block is padded
    ]
