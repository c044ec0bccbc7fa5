"""Chunked cross-entropy against the plain one, and its peak memory."""

import math

import pytest
import torch

from nanochat_cli.bench.peak_memory import peak_growth
from nanochat_cli.training.losses import LossOptions, chunked_cross_entropy, cross_entropy, token_scores


def problem(tokens=300, dim=48, vocab=200, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=dtype, requires_grad=True)
    unembedding = torch.randn(vocab, dim, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[::7] = -100
    return hidden, unembedding, targets


@pytest.mark.parametrize("chunk", [1, 64, 299, 300, 1000])
@pytest.mark.parametrize(
    "options", [LossOptions(), LossOptions(label_smoothing=0.1), LossOptions(0.05, z_loss=1e-2, entropy_weight=0.1)]
)
def test_loss_and_gradients_equal_the_plain_form(chunk, options):
    hidden, unembedding, targets = problem(dtype=torch.float32)
    plain, plain_reported = cross_entropy(hidden, unembedding, targets, options)
    chunked, reported = chunked_cross_entropy(hidden, unembedding, targets, chunk, options)
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reported, plain_reported, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(plain * 0.5, (hidden, unembedding))
    got = torch.autograd.grad(chunked * 0.5, (hidden, unembedding))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_the_reported_loss_is_torch_cross_entropy_whatever_the_objective_adds():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    reference = torch.nn.functional.cross_entropy(hidden @ unembedding.T, targets)
    for options in (LossOptions(), LossOptions(0.1, 0.01, 0.01)):
        _, reported = chunked_cross_entropy(hidden, unembedding, targets, 64, options)
        torch.testing.assert_close(reported, reference.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_label_smoothing_is_that_of_torch(smoothing):
    """Both forms share our formula; torch's is its own."""
    hidden, unembedding, targets = problem(dtype=torch.float32)
    torch_loss = torch.nn.functional.cross_entropy(hidden @ unembedding.T, targets, label_smoothing=smoothing)
    expected = torch.autograd.grad(torch_loss, (hidden, unembedding))
    objective, _ = chunked_cross_entropy(hidden, unembedding, targets, 64, LossOptions(label_smoothing=smoothing))
    torch.testing.assert_close(objective, torch_loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(objective, (hidden, unembedding)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("form", [cross_entropy, chunked_cross_entropy])
def test_what_z_loss_and_entropy_bonus_add_is_computed_by_hand(form):
    """Logits log 1, log 2, log 5: they sum to 8, so p = 1/8, 2/8, 5/8 and logsumexp = log 8."""
    hidden = torch.tensor([1.0, 2.0, 5.0]).log().unsqueeze(0)
    targets, identity = torch.tensor([1]), torch.eye(3)
    p = [1 / 8, 2 / 8, 5 / 8]
    entropy = -sum(share * math.log(share) for share in p)

    def added(**options: float) -> float:
        objective, reported = form(hidden, identity, targets, options=LossOptions(**options))
        assert float(reported) == pytest.approx(math.log(4))
        return float(objective) - math.log(4)

    assert added(z_loss=0.1) == pytest.approx(0.1 * math.log(8) ** 2, rel=1e-5)
    # A bonus: a prediction that is less certain costs less.
    assert added(entropy_weight=0.2) == pytest.approx(-0.2 * entropy, rel=1e-5)
    # ε / V on every token: 0.3 times the mean of −log p, and 0.7 of the target's.
    mean = -sum(math.log(share) for share in p) / 3
    assert added(label_smoothing=0.3) == pytest.approx(0.3 * (mean - math.log(4)), rel=1e-5)


def test_only_the_unembedding_or_only_the_hidden_state_may_need_a_gradient():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    loss, _ = chunked_cross_entropy(hidden.detach(), unembedding, targets)
    loss.backward()
    assert unembedding.grad is not None
    assert hidden.grad is None


def test_without_gradients_nothing_but_the_number_is_computed():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    with torch.no_grad():
        loss, reported = chunked_cross_entropy(hidden, unembedding, targets, 64)
    assert float(loss) == pytest.approx(float(reported))
    assert not loss.requires_grad


SETUP = """
import torch
from nanochat_cli.training.losses import chunked_cross_entropy, cross_entropy
hidden = torch.randn(4096, 64, requires_grad=True)
unembedding = torch.randn(32768, 64, requires_grad=True)
targets = torch.randint(0, 32768, (4096,))
"""


def test_peak_memory_is_that_of_a_chunk_not_of_all_logits():
    """4096 × 32768 float32 logits are 512 MiB; a chunk of 256 tokens is 32 MiB, with a few temporaries."""
    logits = 4096 * 32768 * 4
    assert peak_growth(SETUP, "cross_entropy(hidden, unembedding, targets)[0].backward()") > 1.9 * logits
    assert peak_growth(SETUP, "chunked_cross_entropy(hidden, unembedding, targets, 256)[0].backward()") < 0.4 * logits


def test_known_logits_give_the_loss_of_some_tokens_without_being_computed_again():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    kept = torch.arange(0, len(targets), 2)
    logits = torch.empty(len(targets), len(unembedding))
    losses, _ = token_scores(hidden.detach(), unembedding.detach(), targets, 7, keep=logits)
    assert torch.equal(losses, token_scores(hidden.detach(), unembedding.detach(), targets, 7)[0])
    found = []
    for known in (None, (logits, kept)):
        objective, _ = chunked_cross_entropy(hidden[kept], unembedding, targets[kept], 7, known=known)
        found.append((objective, *torch.autograd.grad(objective, (hidden, unembedding))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
