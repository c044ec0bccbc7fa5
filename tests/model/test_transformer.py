"""The whole model: quantisation in its place, gradients everywhere, causality, parameter accounting."""

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_kernels import fake_quantize_activations, ternarize


def build(seed: int = 0, **options: object) -> Transformer:
    shape = {
        "vocab_size": 96,
        "dim": 128,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 256,
        "max_seq_len": 48,
    }
    torch.manual_seed(seed)
    return Transformer(ModelConfig.model_validate(shape | options))


def tokens(batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_a_bitlinear_computes_with_codes_scales_and_int8_activations():
    layer = build().blocks[0].feed_forward.w_up
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2))
    ternary = ternarize(layer.weight, "row")
    expected = fake_quantize_activations(x).double() @ ternary.dequantize().double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_weights_change_only_when_requantised():
    """One quantisation per optimizer step: what the forward pass uses is fixed in between."""
    model = build()
    before = model(tokens())
    with torch.no_grad():
        for _, layer in model.ternary_layers():
            layer.weight.add_(0.05 * torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(model(tokens()), before)
    model.requantize()
    assert not torch.equal(model(tokens()), before)


def test_every_parameter_receives_a_gradient():
    for options in ({}, {"qk_norm": True}, {"sub_norm": True, "tie_embeddings": True, "n_kv_heads": 4}):
        model = build(**options)
        model.logits(model(tokens())).logsumexp(-1).sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing, f"{options}: {missing}"


def test_a_float_twin_holds_no_buffer_of_quantisation_and_is_a_plain_linear():
    twin = build(quant={"enabled": False})
    assert [name for name, _ in twin.named_buffers()] == ["cos", "sin"]
    layer = twin.blocks[0].attention.wo
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(4))
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight))


def test_a_token_does_not_see_the_future():
    model = build(quant={"activations": False})
    one, other = tokens(), tokens()
    other[:, 12:] = (other[:, 12:] + 1) % 96
    torch.testing.assert_close(model(one)[:, :12], model(other)[:, :12])
    assert not torch.allclose(model(one)[:, 12:], model(other)[:, 12:])


def test_tied_models_have_no_head_and_use_the_embedding():
    model = build(tie_embeddings=True)
    assert model.unembedding is model.embedding.weight
    assert "head.weight" not in model.state_dict()


def test_a_position_past_the_maximum_is_refused():
    with pytest.raises(ValueError, match="max_seq_len = 48"):
        build()(tokens(length=49))


def test_loading_codes_makes_the_layer_compute_with_exactly_those():
    source, target = build(seed=5), build(seed=6)
    for (_, a), (_, b) in zip(source.ternary_layers(), target.ternary_layers(), strict=True):
        b.set_ternary(a.ternary())
        assert torch.equal(a.operand, b.operand)
        assert torch.equal(a.scales, b.scales)
    target.requantize()
    for (_, a), (_, b) in zip(source.ternary_layers(), target.ternary_layers(), strict=True):
        assert torch.equal(a.operand, b.operand)
        assert torch.equal(a.scales, b.scales)
        assert torch.equal(a.ternary().codes, b.ternary().codes)


def test_checkpointed_activations_give_the_same_gradients():
    plain, saving = build(), build()
    saving.gradient_checkpointing = True
    for model in (plain, saving):
        model(tokens()).square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_checkpointed_activations_are_not_kept_but_computed_again():
    saved, runs = [], []
    for checkpointing in (False, True):
        model, size, calls = build(), [0], [0]
        model.gradient_checkpointing = checkpointing
        for block in model.blocks:
            block.register_forward_pre_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))

        def keep(tensor: torch.Tensor, size: list[int] = size) -> torch.Tensor:
            size[0] += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            found = model(tokens()).sum()
            saved.append(size[0])  # by the forward pass alone
            found.backward()
        runs.append(calls[0])
    assert runs == [2, 4], "each of two blocks once, and once more in the backward pass"
    assert saved[1] < 0.2 * saved[0]


def test_compiled_blocks_compute_what_eager_ones_do():
    eager, compiled = build(), build()
    for block in compiled.blocks:
        block.compile(dynamic=False)
    torch.testing.assert_close(compiled(tokens()), eager(tokens()), rtol=1e-3, atol=1e-3)


def test_the_layer_types_are_those_that_the_optimizer_and_the_exporter_look_for():
    names = [name for name, layer in build().linears() if isinstance(layer, BitLinear)]
    assert names[:7] == [
        "blocks.0.attention.wq",
        "blocks.0.attention.wk",
        "blocks.0.attention.wv",
        "blocks.0.attention.wo",
        "blocks.0.feed_forward.w_gate",
        "blocks.0.feed_forward.w_up",
        "blocks.0.feed_forward.w_down",
    ]
    assert len(names) == 14
