"""Parameter groups: every parameter exactly once, and AdamW's state by name."""

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig, OptimConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.optim.muon import Muon


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
        optimizers.step(step, 12)
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


def test_gradients_within_the_limit_are_not_written_and_a_nan_reaches_all():
    network = model()
    optimizers = build_optimizer(network, OptimConfig())
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    versions = [p.grad._version for p in network.parameters() if p.grad is not None]
    optimizers.clip_grad_norm(1e6)
    assert versions == [p.grad._version for p in network.parameters() if p.grad is not None]
    first = next(network.parameters())
    first.grad = torch.full_like(first, torch.nan)
    optimizers.clip_grad_norm(1e6)
    assert all(p.grad.isnan().all() for p in network.parameters() if p.grad is not None)


def test_state_bytes_are_those_of_muon_momentum_and_two_adamw_moments():
    network = model()
    optimizers = build_optimizer(network, OptimConfig())
    train(network, optimizers, 1, 3)
    matrices = sum(layer.weight.numel() for _, layer in network.linears())
    others = sum(p.numel() for p in network.parameters()) - matrices
    assert optimizers.state_bytes() == 4 * matrices + 8 * others


OPTIMIZERS = {
    "muon": {},
    "adamw": {"matrix": "adamw"},
    "8-bit muon": {"eight_bit": True},
    "8-bit adamw": {"matrix": "adamw", "eight_bit": True},
    "galore muon": {"galore": {"enabled": True, "rank": 8}},
    "galore adamw": {"matrix": "adamw", "galore": {"enabled": True, "rank": 8}},
    "lion": {"other": "lion", "lion_lr_mult": 0.25, "lion_weight_decay": 0.8},
}
RATES = {"lr": 0.1, "embedding_lr": 0.2, "head_lr": 0.3, "scalar_lr": 0.4}


def without_gradients(options: dict, step: int, total: int) -> tuple[dict, dict, dict]:
    """Parameters before and after one step with zero gradients, where only decay acts, and the group of each."""
    config = OptimConfig.model_validate({**RATES, "weight_decay": 0.5, "warmup_steps": 0, **options})
    network = model()
    optimizers = build_optimizer(network, config)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizers.step(step, total)
    after = {name: p.detach() for name, p in network.named_parameters()}
    return before, after, {name: group.name for group in optimizers.groups for name in group.names}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_without_gradients_a_step_multiplies_a_matrix_by_one_minus_rate_times_decay(kind):
    """Decoupled decay (arXiv:1711.05101): w ← w − η λ w, on matrices with λ = 0.5, on the rest with Lion's or none."""
    before, after, group = without_gradients({**OPTIMIZERS[kind], "schedule": "constant"}, 3, 10)
    for name, weight in before.items():
        factor = 1 - 0.1 * 0.5 if group[name] == "matrix" else 1.0
        if kind == "lion" and group[name] != "matrix":
            rate = {"embedding": 0.2, "head": 0.3, "scalar": 0.4}[group[name]]
            factor = 1 - 0.25 * rate * 0.8
        torch.testing.assert_close(after[name], factor * weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("step", [5, 6, 8])
def test_the_last_third_of_a_two_stage_run_has_no_weight_decay(kind, step):
    """Of 9 steps the first six (index 5) decay, at 2/3 of (1 − 5/9) of the rate, as the second stage has it."""
    before, after, group = without_gradients({**OPTIMIZERS[kind], "schedule": "two_stage"}, step, 9)
    factor = 1 - 0.1 * (1 - 5 / 9) * (2 / 3) * 0.5 if step == 5 else 1.0
    for name, weight in before.items():
        if group[name] == "matrix":
            torch.testing.assert_close(after[name], factor * weight, rtol=1e-5, atol=1e-7, msg=name)
        elif step > 5:
            assert torch.equal(after[name], weight), name


def test_rates_betas_and_eps_reach_the_groups_in_their_names():
    """Two AdamW steps written out with scalars (arXiv:1711.05101, Algorithm 2), eps so large that it is seen."""
    beta1, beta2, eps = 0.7, 0.9, 0.5
    options = {**RATES, "matrix": "adamw", "betas": [beta1, beta2], "eps": eps, "schedule": "constant"}
    network = model()
    optimizers = build_optimizer(network, OptimConfig.model_validate({**options, "warmup_steps": 0}))
    group = {name: one.name for one in optimizers.groups for name in one.names}
    rate = {"matrix": 0.1, "embedding": 0.2, "head": 0.3, "scalar": 0.4}
    before = {name: float(p.detach().flatten()[0]) for name, p in network.named_parameters()}
    mean = square = 0.0
    expected = dict(before)
    for t, gradient in enumerate((0.3, -0.8), start=1):
        for p in network.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizers.step(t, 10)
        mean, square = beta1 * mean + (1 - beta1) * gradient, beta2 * square + (1 - beta2) * gradient**2
        update = mean / (1 - beta1**t) / ((square / (1 - beta2**t)) ** 0.5 + eps)
        expected = {name: value - rate[group[name]] * update for name, value in expected.items()}
    found = {name: float(p.detach().flatten()[0]) for name, p in network.named_parameters()}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert set(group.values()) == set(rate)


@pytest.mark.parametrize(
    ("key", "value", "argument"),
    [
        ("muon_momentum", 0.5, "momentum"),
        ("muon_nesterov", False, "nesterov"),
        ("muon_ns_steps", 2, "ns_steps"),
        ("muon_coefficients", "polar-express", "coefficients"),
        ("muon_coefficients", "cans", "coefficients"),
        ("muon_equilibrate", True, "equilibrate"),
        ("muon_variance_beta", 0.5, "variance_beta"),
    ],
)
def test_a_setting_of_muon_reaches_the_matrices(key, value, argument):
    def weights_after(optimizer, network, *arguments):
        for step, generator in ((s, torch.Generator().manual_seed(s)) for s in (1, 2)):
            for _, layer in network.linears():
                layer.weight.grad = torch.randn(layer.weight.shape, generator=generator)
            optimizer.step(*(arguments or (step, 10)))
        return torch.cat([layer.weight.detach().flatten() for _, layer in network.linears()])

    options = {"lr": 0.1, "warmup_steps": 0, "schedule": "constant"}
    ours, plain, by_hand = model(), model(), model()
    configured = weights_after(build_optimizer(ours, OptimConfig.model_validate({**options, key: value})), ours)
    default = weights_after(build_optimizer(plain, OptimConfig.model_validate(options)), plain)
    named = [(f"{name}.weight", layer.weight) for name, layer in by_hand.linears()]
    expected = weights_after(Muon(named, **{argument: value}), by_hand, 0.1)
    assert torch.equal(configured, expected)
    assert not torch.equal(configured, default)
