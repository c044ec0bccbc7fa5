"""Parameter groups: every parameter exactly once, and AdamW's state by name."""

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig, OptimConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer


def model(**options: object) -> Transformer:
    shape = {
        "vocab_size": 64,
        "dim": 64,
        "n_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 1,
        "ffn_dim": 64,
        "max_seq_len": 16,
    }
    torch.manual_seed(0)
    return Transformer(ModelConfig.model_validate(shape | options))


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_belongs_to_exactly_one_group(tied):
    network = model(tie_embeddings=tied, qk_norm=True)
    groups = build_optimizer(network, OptimConfig()).groups
    names = [name for group in groups for name in group.names]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    assert len(names) == len(set(names))
    matrix = next(group for group in groups if group.name == "matrix")
    assert all(".w" in name for name in matrix.names)
    assert len(matrix.names) == 14


def train(network, optimizers, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, 64, (2, 16), generator=generator)
        network.logits(network(tokens)).log_softmax(-1)[..., 0].sum().backward()
        optimizers.clip_grad_norm(1.0)
        optimizers.step(1, 4)
        network.requantize()
        optimizers.zero_grad()


@pytest.mark.parametrize("options", [{}, {"other": "lion"}, {"matrix": "adamw", "lr": 0.003}])
def test_state_restored_into_a_fresh_optimizer_continues_bit_for_bit(options):
    config = OptimConfig.model_validate(options)
    network = model()
    optimizers = build_optimizer(network, config)
    train(network, optimizers, 3, 1)
    twin = model()
    twin.load_state_dict(network.state_dict())
    twin.requantize()
    restored = build_optimizer(twin, config)
    restored.load_state_dict(optimizers.state_dict())
    train(network, optimizers, 3, 2)
    train(twin, restored, 3, 2)
    for (name, a), (_, b) in zip(network.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_clip_norm_counts_every_trained_parameter():
    network = model()
    optimizers = build_optimizer(network, OptimConfig())
    network.logits(network(torch.zeros(1, 8, dtype=torch.int64))).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(optimizers.clip_grad_norm(0.0), expected, rtol=1e-5, atol=0)
    optimizers.clip_grad_norm(0.25)
    clipped = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.25), rtol=1e-5, atol=0)


def test_state_bytes_are_those_of_muon_momentum_and_two_adamw_moments():
    network = model()
    optimizers = build_optimizer(network, OptimConfig())
    train(network, optimizers, 1, 3)
    matrices = sum(layer.weight.numel() for _, layer in network.linears())
    others = sum(p.numel() for p in network.parameters()) - matrices
    assert optimizers.state_bytes() == 4 * matrices + 8 * others
