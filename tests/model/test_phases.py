"""Layers before they are ternary: λ = 0 is the float twin and 1 the ternary model, to the bit; between, the formula."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from nanochat_cli.config.sections.model import ModelConfig, QuantConfig
from nanochat_cli.model.bitlinear import BitLinear, Phase
from nanochat_cli.model.transformer import Transformer
from nanochat_kernels import KeptRows
from tests.architectures import COMBINATIONS, build

TOKENS = torch.randint(288, (2, 24), generator=torch.Generator().manual_seed(0))


def in_phase(model: Transformer, phase: Phase, share: float) -> Transformer:
    value = torch.tensor(share)
    for _, layer in model.linears():
        layer.use_phase(phase, value)
    model.requantize()
    return model


def twin(model: Transformer) -> Transformer:
    config = model.config.model_dump()
    floats = Transformer(ModelConfig.model_validate({**config, "quant": {"enabled": False}}))
    floats.load_state_dict(model.state_dict())
    return floats


def output_and_gradients(model: Transformer, kept: torch.Tensor | None = None) -> list[torch.Tensor]:
    model.train()
    if kept is not None:
        rows = KeptRows.all_of(TOKENS.numel())
        rows.choose(kept)
        for _, layer in model.linears():
            layer.kept = rows
    y = model(TOKENS)
    gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    return [y, *(g for g in gradients if g is not None)]


def assert_same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("combination", COMBINATIONS[::7])
@pytest.mark.parametrize("forms", [("float", "exact"), ("int8", "int8")], ids=str)
def test_a_layer_in_float_computes_what_its_float_twin_does(combination, forms):
    model = build(combination)
    model.use_forms(*forms)
    assert_same_bits(output_and_gradients(in_phase(model, "float", 0)), output_and_gradients(twin(model)))


def test_rows_that_are_left_out_are_those_of_the_float_twin():
    model, kept = build("plain+attention+dense+untied"), torch.arange(3, 40)
    one = output_and_gradients(in_phase(model, "float", 0), kept)
    assert_same_bits(one, output_and_gradients(twin(model), kept))


@pytest.mark.parametrize("combination", COMBINATIONS[3::9])
def test_after_float_and_ramp_a_layer_computes_what_it_always_did(combination):
    model = build(combination)
    before = output_and_gradients(model)
    for phase, share in (("float", 0.0), ("ramp", 0.3), ("ternary", 1.0)):
        found = output_and_gradients(in_phase(model, phase, share))
        assert torch.equal(found[0], before[0]) == (phase == "ternary")
    assert_same_bits(found, before)


@pytest.mark.parametrize("scale", ["row", "tensor", 64])
@pytest.mark.parametrize("activations", [True, False])
def test_in_the_ramp_weights_and_activations_are_mixed_with_straight_through_gradients(scale, activations):
    """Against float64 and autograd, with the ternary weight written out."""
    torch.manual_seed(1)
    layer = BitLinear(128, 32, QuantConfig(scale=scale, activations=activations))
    torch.nn.init.normal_(layer.weight, std=0.02)
    share, x = torch.tensor(0.4), torch.randn(6, 128, requires_grad=True)
    layer.use_phase("ramp", share)
    layer.requantize()
    y = layer(x)
    found = torch.autograd.grad(y, (x, layer.weight), torch.ones_like(y))

    w, a = layer.weight.detach().double(), x.detach().double()
    groups = {"row": (32, 128), "tensor": (1, 32 * 128), 64: (64, 64)}[scale]
    s = w.reshape(groups).abs().mean(dim=1, keepdim=True).half().double()
    ternary = ((w.reshape(groups) / s).round().clamp(-1, 1) * s).reshape(w.shape)
    step = a.abs().amax(dim=1, keepdim=True) / 127
    used_w = w + 0.4 * (ternary - w)
    used_a = a + (0.4 * ((a / step).round() * step - a) if activations else 0)
    ones = torch.ones(6, 32, dtype=torch.float64)
    for ours, expected in zip((y, *found), (used_a @ used_w.T, ones @ used_w, ones.T @ used_a), strict=True):
        torch.testing.assert_close(ours.detach().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_another_share_compiles_nothing_again_and_another_phase_once():
    model = build("plain+attention+dense+untied", n_layers=1).train()
    share, counter = torch.tensor(0.1), CompileCounter()
    block = torch.compile(model.blocks[0], backend=counter, dynamic=False)
    x = torch.randn(1, 8, 256)
    seen = []
    for phase, value in (("float", 0), ("ramp", 0.1), ("ramp", 0.5), ("ramp", 0.9), ("ternary", 1), ("ternary", 1)):
        share.fill_(value)
        for _, layer in model.linears():
            if layer.phase != phase:
                layer.use_phase(phase, share)
        model.requantize()
        block(x, model.cos[:8], model.sin[:8])
        seen.append(counter.frame_count)
    assert seen[0] < seen[1] == seen[2] == seen[3] < seen[4] == seen[5]


def test_no_phase_is_saved():
    model = build("plain+attention+dense+tied")
    keys = set(model.state_dict())
    assert set(in_phase(model, "ramp", 0.5).state_dict()) == keys
