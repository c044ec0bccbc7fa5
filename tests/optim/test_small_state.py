"""Optimizers with small state as a whole: bytes, checkpoints, clipping, and what is refused."""

import pytest
import torch

from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import ModelConfig, OptimConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer

GALORE = {"enabled": True, "rank": 16, "update_freq": 3}


def model(**options):
    shape = {
        "vocab_size": 128,
        "dim": 64,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "ffn_dim": 96,
        "max_seq_len": 8,
    }
    torch.manual_seed(0)
    return Transformer(ModelConfig.model_validate(shape | options))


def step(network, optimizers, seed, index=1):
    """A step on random gradients: what the model computes does not matter here."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizers.clip_grad_norm(1.0)
    optimizers.step(index, 20)
    optimizers.zero_grad()


def copied(state):
    return {g: {n: {k: t.clone() for k, t in one.items()} for n, one in of.items()} for g, of in state.items()}


KINDS = [
    {"eight_bit": True},
    {"eight_bit": True, "eight_bit_other": False},
    {"eight_bit": True, "other": "lion", "state_block": 128},
    {"eight_bit": True, "matrix": "adamw", "lr": 0.003},
    {"galore": GALORE},
    {"galore": GALORE, "matrix": "adamw", "lr": 0.003},
    {"galore": GALORE, "eight_bit": True, "muon_momentum_start": 0.5, "muon_momentum_warmup": 9},
    {"galore": GALORE | {"unbiased": True}, "eight_bit": True},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_state_restored_into_a_fresh_optimizer_continues_bit_for_bit(options):
    config = OptimConfig.model_validate(options)
    network, twin = model(), model()
    optimizers = build_optimizer(network, config)
    for i in range(4):
        step(network, optimizers, i)
    twin.load_state_dict(network.state_dict())
    restored = build_optimizer(twin, config)
    restored.load_state_dict(copied(optimizers.state_dict()))
    for i in range(4, 8):
        step(network, optimizers, i)
        step(twin, restored, i)
    for (name, a), (_, b) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("saved", "resumed", "message"),
    [
        ({}, {"eight_bit": True, "eight_bit_other": False}, "another optim.eight_bit "),
        ({"eight_bit": True}, {"eight_bit": True, "eight_bit_other": False}, "another optim.eight_bit_other "),
        ({}, {"galore": GALORE}, "another optim.galore.enabled "),
        ({"galore": GALORE}, {"matrix": "adamw"}, "another optim.matrix "),
        ({"eight_bit": True}, {"eight_bit": True, "state_block": 128}, "optim.state_block"),
        ({"galore": GALORE}, {"galore": GALORE | {"rank": 8}}, "optim.galore settings"),
    ],
)
def test_state_of_another_kind_is_refused_with_the_key_that_differs(saved, resumed, message):
    state = build_optimizer(model(), OptimConfig.model_validate(saved)).state_dict()
    with pytest.raises(DataError, match=message):
        build_optimizer(model(), OptimConfig.model_validate(resumed)).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"galore": GALORE | {"unbiased": True}, "matrix": "adamw"}, "needs optim.matrix = muon"),
        ({"galore": GALORE | {"unbiased": True, "full_rank_share": 1.0}}, "full_rank_share = 1"),
        ({"galore": GALORE | {"unbiased": True, "release_gradients": True}}, "release_gradients"),
        ({"galore": GALORE, "muon_equilibrate": True}, "optim.muon_equilibrate"),
        ({"galore": GALORE, "muon_variance_beta": 0.9}, "optim.muon_variance_beta"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer(model(), OptimConfig.model_validate(options))


def state_bytes(preset, **options):
    """Bytes of all state tensors, and of the matrices' ones; the meta device allocates nothing."""
    config = resolve_config([preset], None, [f"optim.{key}={value}" for key, value in options.items()])
    with torch.device("meta"):
        network = Transformer(config.model)
    optimizers = build_optimizer(network, config.optim)
    tensors = next(group for group in optimizers.groups if group.name == "matrix").optimizer.state_tensors()
    return optimizers.state_bytes(), sum(t.numel() * t.element_size() for t in tensors)


def test_state_bytes_of_d20():
    adamw, _ = state_bytes("d20", matrix="adamw")
    _, muon = state_bytes("d20")
    total, matrices = state_bytes("d20", eight_bit="true")
    assert matrices <= 0.26 * muon
    assert total <= 0.16 * adamw
    galore = {"galore.enabled": "true", "galore.rank": 256}
    assert state_bytes("d20", **galore)[0] <= 0.35 * adamw
    hybrid, _ = state_bytes("d20", **galore, eight_bit="true")
    assert 0.06 * adamw < hybrid <= 0.07 * adamw  # AdamW's two moments of embedding and head are over half of it
    smallest, _ = state_bytes("d20", **galore, eight_bit="true", other="lion", state_block=2048)
    assert smallest <= 0.05 * adamw


def test_state_bytes_are_those_of_the_tensors_in_the_state():
    optimizers = build_optimizer(model(), OptimConfig.model_validate({"eight_bit": True, "galore": GALORE}))
    held = [t for of in optimizers.state_dict().values() for one in of.values() for t in one.values() if t.ndim]
    assert optimizers.state_bytes() == sum(t.numel() * t.element_size() for t in held)


def test_the_norm_of_released_gradients_is_that_of_their_projections_and_they_are_clipped_too():
    network = model()
    options = {"galore": GALORE | {"release_gradients": True}}
    optimizers = build_optimizer(network, OptimConfig.model_validate(options))
    sum(p.square().sum() for p in network.parameters()).backward()
    (galore,) = [group.optimizer for group in optimizers.groups if group.name == "matrix"]
    collected = list(galore.collected_gradients())
    assert len(collected) == 14
    others = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(others) == len(list(network.parameters())) - 14
    expected = torch.cat([t.flatten() for t in (*others, *collected)]).norm()
    torch.testing.assert_close(optimizers.clip_grad_norm(0.0), expected, rtol=1e-5, atol=0)
    optimizers.clip_grad_norm(0.5)
    clipped = torch.cat([t.flatten() for t in (*others, *galore.collected_gradients())]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.5), rtol=1e-4, atol=0)
    optimizers.zero_grad()
    assert not list(galore.collected_gradients())


@pytest.mark.parametrize("options", [{"eight_bit": True}, {"galore": GALORE, "eight_bit": True}], ids=str)
def test_reset_zeroes_only_the_moments_of_the_named_parameters(options):
    network = model()
    optimizers = build_optimizer(network, OptimConfig.model_validate(options))
    step(network, optimizers, 0)
    before = copied(optimizers.state_dict())["matrix"]
    first, second, *_ = before
    optimizers.reset({first})
    after = optimizers.state_dict()["matrix"]
    assert not after[first]["momentum_scales"].any()
    for key, tensor in before[second].items():
        assert torch.equal(tensor, after[second][key])
    if "projection_codes" in before[first]:
        assert torch.equal(before[first]["projection_codes"], after[first]["projection_codes"])
    step(network, optimizers, 1)
