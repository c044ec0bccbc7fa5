"""Multi-token prediction against the shifted main loss, plain autograd, and its own definition."""

import pytest
import torch
from torch.nn import functional as F

from nanochat_cli.config.schema import MTPConfig
from nanochat_cli.model.mtp import IGNORE, MTP, build_mtp, shifted_targets
from tests.architectures import build, shape
from tests.training.gradients import gradient_of, setup_of, state_of

FLOAT = {"quant": {"enabled": False}}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(288, (3, 17), generator=torch.Generator().manual_seed(4))
    targets = tokens[:, 1:].clone()
    targets[1, 5] = IGNORE
    return tokens[:, :-1], targets


def make(kind: str, combination: str = "plain+attention+dense+untied", **mtp) -> tuple:
    model = build(combination, **FLOAT).train()
    return model, MTP(model.config, MTPConfig.model_validate({"enabled": True, "kind": kind, **mtp}))


def test_off_means_nothing_is_built():
    model = build("plain+attention+dense+untied")
    assert build_mtp(model.config, MTPConfig()) is None


def test_targets_are_shifted_and_the_end_is_ignored():
    targets = torch.tensor([[1, 2, IGNORE, 4]])
    assert shifted_targets(targets, 1).tolist() == [[2, IGNORE, 4, IGNORE]]
    assert shifted_targets(targets, 3).tolist() == [[4, IGNORE, IGNORE, IGNORE]]
    assert shifted_targets(targets, 9).tolist() == [[IGNORE] * 4]


@pytest.mark.parametrize("kind", ["heads", "shared"])
def test_a_head_that_copies_the_main_head_scores_exactly_the_shifted_main_loss(kind):
    model, mtp = make(kind, n_tokens=3)
    inputs, targets = batch()
    for head in mtp.heads:
        head.norm = torch.nn.Identity()
        head.projection.weight.data = torch.eye(256)
    loss = gradient_of(state_of(setup_of(model, mtp, train={"batch_size": 3, "loss_chunk": 7})), inputs, targets)
    logits = model.logits(model(inputs)).detach()
    for i in range(3):
        moved = shifted_targets(targets, i + 1).flatten()
        expected = F.cross_entropy(logits.flatten(0, 1), moved, ignore_index=IGNORE)
        assert loss[f"loss/mtp_{i + 1}"].item() == pytest.approx(expected.item(), abs=2e-6)


@pytest.mark.parametrize("kind", ["heads", "shared", "nextn"])
@pytest.mark.parametrize("combination", ["plain+attention+dense+tied", "mhc-2+hybrid+moe+untied"])
def test_objective_and_gradients_are_those_of_whole_logits(kind, combination):
    model, mtp = make(kind, combination, n_tokens=2, weight=0.3, decay=0.5)
    inputs, targets = batch()
    state = state_of(setup_of(model, mtp, train={"batch_size": 3, "loss_chunk": 7, "total_steps": 100}))
    state.progress.step = 25
    modules = torch.nn.ModuleList([model, mtp])
    loss = gradient_of(state, inputs, targets)
    found = {name: p.grad.clone() for name, p in modules.named_parameters() if p.grad is not None}
    modules.zero_grad()
    hidden = model(inputs)
    weights = [0.3, 0.15] if kind != "nextn" else [0.3]
    factor = 0.75 if kind == "shared" else 1.0
    total = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    for i, (state, weight) in enumerate(zip(mtp.hidden_states(model, hidden, targets), weights, strict=True)):
        moved = shifted_targets(targets, i + 1).flatten()
        part = F.cross_entropy(model.logits(state).flatten(0, 1), moved, ignore_index=IGNORE)
        total = total + factor * weight * part
    total.backward()
    assert loss["loss/objective"].item() == pytest.approx(total.item(), abs=1e-5)
    assert loss["loss/main"] < loss["loss/objective"]
    expected = {name: p.grad for name, p in modules.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(1.0, gradient.abs().max().item()), name
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in mtp.parameters())


def test_heads_are_small_and_not_part_of_the_model():
    model, mtp = make("heads", n_tokens=4)
    assert sum(p.numel() for p in mtp.parameters()) == 4 * (256 * 256 + 256)
    assert shape("plain+attention+dense+untied")["dim"] == 256
    assert not any("mtp" in name or "heads" in name for name in model.state_dict())


def rms_norm(x: list[float], weight: list[float], eps: float) -> list[float]:
    scale = (sum(value * value for value in x) / len(x) + eps) ** -0.5
    return [value * scale * factor for value, factor in zip(x, weight, strict=True)]


def test_nextn_reads_the_token_after_each_position_and_predicts_the_one_after_that():
    """DeepSeek-V3, equations 21 to 23, in loops: M [norm(emb of token t + 1), norm(h_t)] scores token t + 2.

    The block between, which is tested by itself, passes its input on: what it adds to the residual is zero.
    """
    model, mtp = make("nextn")
    nextn, eps = mtp.nextn, model.config.norm_eps
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for norm in (nextn.embedding_norm, nextn.hidden_norm, nextn.norm):
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) + 0.5)
        model.embedding.weight.copy_(torch.randn(model.embedding.weight.shape, generator=generator))
        nextn.block.attention.wo.weight.zero_()
        nextn.block.feed_forward.w_down.weight.zero_()
    text = torch.randint(288, (2, 8), generator=generator)
    inputs, targets = text[:, :-1], text[:, 1:]
    found = gradient_of(state_of(setup_of(model, mtp, train={"batch_size": 2})), inputs, targets)

    hidden = model(inputs).tolist()
    embeddings, projection, head = (
        weight.tolist() for weight in (model.embedding.weight, nextn.projection.weight, model.unembedding)
    )
    norms = [norm.weight.tolist() for norm in (nextn.embedding_norm, nextn.hidden_norm, nextn.norm)]
    losses = []
    for row in range(2):
        for t in range(6):  # of seven positions: after the last, token t + 2 is not known
            following, wanted = int(text[row, t + 1]), int(text[row, t + 2])
            joined = rms_norm(embeddings[following], norms[0], eps) + rms_norm(hidden[row][t], norms[1], eps)
            state = [sum(a * b for a, b in zip(weights, joined, strict=True)) for weights in projection]
            state = rms_norm(state, norms[2], eps)
            logits = torch.tensor([sum(a * b for a, b in zip(row_, state, strict=True)) for row_ in head])
            losses.append(float(logits.logsumexp(0) - logits[wanted]))
    assert found["loss/mtp_1"].item() == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_rows_of_each_step_together_have_the_gradient_of_all_rows():
    """One head: its mean over a part of the rows, weighted with how many of those have a target, is that over all."""
    model, mtp = make("heads", n_tokens=1, every=2)
    inputs, targets = batch()
    parameters = list(torch.nn.ModuleList([model, mtp]).parameters())
    has_target = shifted_targets(targets, 1).flatten() != IGNORE

    def gradient_at(step: int, every: int) -> list[torch.Tensor]:
        mtp.config = mtp.config.model_copy(update={"every": every})
        state = state_of(setup_of(model, mtp, train={"batch_size": 3}))
        state.progress.step = step
        gradient_of(state, inputs, targets)
        return [parameter.grad.clone() for parameter in parameters]

    shares = [float(has_target[offset::2].sum() / has_target.sum()) for offset in (0, 1)]
    assert shares[0] != shares[1]
    parts = [gradient_at(step, 2) for step in (6, 7)]
    assert not torch.allclose(parts[0][-1], parts[1][-1])
    for whole, first, second in zip(gradient_at(6, 1), *parts, strict=True):
        torch.testing.assert_close(shares[0] * first + shares[1] * second, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"fade": 0.5}, [1, 0.5, 0, 0, 0]),
        ({"kind": "shared"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "shared", "fade": 0.5}, [1, 0.5, 0, 0, 0]),
    ],
)
def test_the_weight_follows_the_run(more, expected):
    _, mtp = make(**{"kind": "heads", "n_tokens": 2, "weight": 0.3, "decay": 0.5} | more)
    found = [mtp.weights(progress) for progress in (0, 0.25, 0.5, 0.75, 1)]
    assert found == [pytest.approx([0.3 * factor, 0.15 * factor]) for factor in expected]


def test_without_weight_heads_have_a_gradient_of_zero_and_the_model_that_of_plain_training():
    model, mtp = make("heads", n_tokens=1, fade=0.5)
    inputs, targets = batch()
    state = state_of(setup_of(model, mtp, train={"batch_size": 3, "total_steps": 10}))
    state.progress.step = 5
    metrics = gradient_of(state, inputs, targets)
    found = [parameter.grad.clone() for parameter in model.parameters()]
    assert "loss/mtp_1" not in metrics
    assert all(not parameter.grad.any() for parameter in mtp.parameters())
    gradient_of(state_of(setup_of(model, train={"batch_size": 3})), inputs, targets)
    assert all(torch.equal(a, b.grad) for a, b in zip(found, model.parameters(), strict=True))
