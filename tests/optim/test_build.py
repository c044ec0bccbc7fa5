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


@pytest.mark.parametrize("matrix", ["muon", "adamw"])
def test_the_first_step_has_the_settings_of_the_configuration(matrix):
    """AdamW by its definition (arXiv:1711.05101); after one step the bias corrections leave g / (|g| + eps)."""
    network = model()
    config = OptimConfig(matrix=matrix, lr=0.03, embedding_lr=0.02, eps=0.05, betas=(0.7, 0.9), warmup_steps=0)
    optimizers = build_optimizer(network, config)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    optimizers.step(0, 10)
    by_definition = [group for group in optimizers.groups if not (matrix == "muon" and group.name == "matrix")]
    assert len(by_definition) == len(optimizers.groups) - (matrix == "muon")
    parameters = dict(network.named_parameters())
    for group in by_definition:
        for name in group.names:
            gradient = parameters[name].grad
            assert gradient is not None
            expected = before[name] - group.lr * gradient / (gradient.abs() + 0.05)
            torch.testing.assert_close(parameters[name].detach(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("galore", [{"enabled": False}, {"enabled": True, "rank": 4}], ids=["whole", "galore"])
def test_every_step_of_muon_has_the_momentum_of_its_place_in_the_warm_up(galore):
    network = model()
    settings = {"muon_momentum": 0.9, "muon_momentum_start": 0.5, "muon_momentum_warmup": 4, "galore": galore}
    optimizers = build_optimizer(network, OptimConfig.model_validate(settings))
    (matrix,) = [group.optimizer for group in optimizers.groups if group.name == "matrix"]
    seen = []
    for step in (0, 1, 2, 3, 4, 9):
        network.logits(network(torch.zeros(1, 8, dtype=torch.int64))).sum().backward()
        optimizers.step(step, 10)
        seen.append(matrix.momentum)
        optimizers.zero_grad()
    assert seen == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9])


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
