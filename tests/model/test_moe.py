"""Mixture of experts against a dense loop over the experts: values and gradients; balance, capacity, bias."""

import pytest
import torch
from torch import Tensor

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.moe import MoE
from nanochat_cli.optim.muon import Muon
from nanochat_kernels import quantize_input
from nanochat_kernels.experts import grouped_bit_linear, grouped_bit_linear_reference

SHAPE = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 48, "max_seq_len": 32}


def mixture(**moe) -> MoE:
    torch.manual_seed(0)
    quant = moe.pop("quant", {})
    config = ModelConfig.model_validate({**SHAPE, "quant": quant, "moe": {"enabled": True, "experts": 4, **moe}})
    module = MoE(config)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    requantize(module)
    return module


def requantize(module: MoE) -> None:
    for layer in (module.w_gate, module.w_up, module.w_down):
        layer.requantize()


def dense_loop(module: MoE, x: Tensor) -> Tensor:
    """Every expert on every token, times its weight from the router, which is 0 unless it was chosen."""
    flat = x.reshape(-1, x.shape[-1])
    probabilities = (flat @ module.router.weight.T).softmax(-1)
    biased = probabilities if module.balance_bias is None else probabilities + module.balance_bias
    chosen = biased.topk(module.config.active).indices
    mask = torch.zeros_like(probabilities).scatter(1, chosen, 1.0)
    weights = probabilities * mask
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(flat)
    for expert in range(module.config.experts):
        gate, up = (straight_through(layer, expert, flat) for layer in (module.w_gate, module.w_up))
        hidden = torch.nn.functional.silu(gate) * up
        out = out + weights[:, expert : expert + 1] * straight_through(module.w_down, expert, hidden)
    return out.reshape(x.shape)


def straight_through(layer, expert: int, x: Tensor) -> Tensor:
    rows = layer.out_features // layer.experts
    own = slice(expert * rows, (expert + 1) * rows)
    latent = layer.weight[own]
    if not layer.quant.enabled:
        return x @ latent.T
    effective = layer.ternary().dequantize()[own]
    quantized = quantize_input(x)
    rounded = quantized.codes * quantized.scale
    return (x + (rounded - x).detach()) @ (latent + (effective - latent).detach()).T


@pytest.mark.parametrize("scale", ["row", "tensor", None])
@pytest.mark.parametrize("balance", ["none", "bias"])
def test_equals_the_dense_loop_in_values_and_gradients(scale, balance):
    quant = {"enabled": False} if scale is None else {"scale": scale}
    module = mixture(quant=quant, balance=balance)
    if module.balance_bias is not None:
        module.balance_bias.copy_(torch.tensor([0.3, -0.2, 0.0, 0.1]))
    gradients = []
    for form in (module, lambda x: dense_loop(module, x)):
        module.zero_grad()
        x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
        y = form(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("counts", [[3, 0, 5, 4], [0, 0, 0, 12], [1, 1, 1, 9]])
def test_the_grouped_product_is_the_loop_over_experts_bit_for_bit(counts):
    module = mixture()
    layer = module.w_gate
    experts = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    x = quantize_input(torch.randn(12, 32))
    arguments = (layer.weight, layer.quantized_weight(), torch.tensor(counts), experts)
    assert torch.equal(grouped_bit_linear(x, *arguments), grouped_bit_linear_reference(x, *arguments))


def test_the_balance_loss_adds_its_gradient_and_changes_no_value():
    x = torch.randn(2, 16, 32)
    with_loss, without = mixture(balance="loss", loss_weight=0.5), mixture(balance="none")
    without.load_state_dict(with_loss.state_dict())
    requantize(without)
    assert torch.equal(with_loss(x), without(x))
    for module in (with_loss, without):
        module(x).sum().backward()
    router = without.router.weight.detach().clone().requires_grad_()
    probabilities = (x.reshape(-1, 32) @ router.T).softmax(-1)
    share = with_loss.load / with_loss.load.sum()
    (0.5 * 4 * (share * probabilities.mean(0)).sum()).backward()
    found = with_loss.router.weight.grad - without.router.weight.grad
    assert (found - router.grad).abs().max() < 1e-5  # of differences of gradients around 1


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_the_load_becomes_more_even_while_training(balance):
    module = mixture(balance=balance, loss_weight=1.0, bias_rate=0.02).train()
    module.router.weight.data.mul_(0.1)
    module.router.weight.data[0] += 0.1  # one expert that nearly every token prefers
    x = torch.randn(1, 256, 32) + 0.5
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    spreads = []
    for _ in range(60):
        module.load.zero_()
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        requantize(module)
        spreads.append((module.load.std() / module.load.mean()).item())
        module.update_balance()
    assert sum(spreads[-5:]) / 5 < 0.6 * spreads[0], spreads[::10]


def test_capacity_drops_the_last_assignments_of_a_full_expert_and_counts_them():
    module = mixture(capacity_factor=1.0, active=1, balance="none").train()
    module.router.weight.data.zero_()
    module.router.weight.data[2] = 1.0
    x = torch.rand(1, 8, 32) + 0.1  # all to expert 2, which has room for 8 · 1 / 4 = 2
    y = module(x)
    assert module.dropped == 6
    assert (y[0, :2].abs().sum(-1) > 0).all()
    assert torch.equal(y[0, 2:], torch.zeros(6, 32))
    assert (module.eval()(x)[0, 2:].abs().sum(-1) > 0).all()  # inference drops nothing


def test_a_shared_expert_sees_every_token():
    module = mixture(shared=True)
    shared = module.shared
    assert shared is not None
    for layer in (shared.w_gate, shared.w_up, shared.w_down):
        layer.requantize()
    x = torch.randn(1, 6, 32)
    y = module(x)
    module.shared = None
    assert torch.allclose(y, module(x) + shared(x), atol=1e-6)


def test_muon_orthogonalises_every_expert_by_itself():
    stacked = torch.nn.Parameter(torch.randn(4 * 8, 16))
    single = [torch.nn.Parameter(part.clone()) for part in stacked.detach().chunk(4)]
    gradient = torch.randn(32, 16)
    stacked.grad = gradient
    for parameter, part in zip(single, gradient.chunk(4), strict=True):
        parameter.grad = part.clone()
    together = Muon([("experts", stacked)], matrices={"experts": 4})
    together.step(0.1)
    Muon([(str(i), parameter) for i, parameter in enumerate(single)]).step(0.1)
    assert torch.allclose(stacked, torch.cat(single), atol=1e-6)
    saved = together.state_dict()["experts"]["momentum"]
    assert saved.shape == (4, 8, 16)
    again = Muon([("experts", torch.nn.Parameter(torch.zeros(32, 16)))], matrices={"experts": 4})
    again.load_state_dict({"experts": {"momentum": saved}})
    assert torch.equal(again.state_dict()["experts"]["momentum"], saved)
