"""Chunked cross-entropy against the plain one, and its peak memory."""

import math

import pytest
import torch

from nanochat_cli.bench.peak_memory import peak_growth
from nanochat_cli.training import losses
from nanochat_cli.training.losses import LossOptions, chunked_cross_entropy, cross_entropy, token_scores
from nanochat_kernels import Backward, head_gradients


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
hidden = torch.randn(2048, 64, requires_grad=True)
unembedding = torch.randn(32768, 64, requires_grad=True)
targets = torch.randint(0, 32768, (2048,))
"""


def test_peak_memory_is_that_of_a_chunk_not_of_all_logits():
    """2048 × 32768 float32 logits are 256 MiB; a chunk of 128 tokens is 16 MiB, with a few temporaries."""
    logits = 2048 * 32768 * 4
    assert peak_growth(SETUP, "cross_entropy(hidden, unembedding, targets)[0].backward()") > 1.9 * logits
    assert peak_growth(SETUP, "chunked_cross_entropy(hidden, unembedding, targets, 128)[0].backward()") < 0.4 * logits


def test_known_logits_give_the_loss_of_some_tokens_without_being_computed_again():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    kept = torch.arange(0, len(targets), 2)
    logits = torch.empty(len(targets), len(unembedding))
    scores, _ = token_scores(hidden.detach(), unembedding.detach(), targets, 7, keep=logits)
    assert torch.equal(scores, token_scores(hidden.detach(), unembedding.detach(), targets, 7)[0])
    found = []
    for known in (None, (logits, kept)):
        objective, _ = chunked_cross_entropy(hidden[kept], unembedding, targets[kept], 7, known=known)
        found.append((objective, *torch.autograd.grad(objective, (hidden, unembedding))))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_replaces_logits_by_their_gradient_gives_the_exact_head(monkeypatch, dtype, known):
    """As on a GPU, with the CPU's kernel and the reference: the logits stay in their dtype between the products."""
    hidden, unembedding, targets = problem(dtype=dtype)
    logits = (hidden @ unembedding.T).detach()
    exact = torch.nn.functional.cross_entropy(hidden.double() @ unembedding.double().T, targets)
    wanted = torch.autograd.grad(exact, (hidden, unembedding))
    monkeypatch.setattr(losses, "_in_one_pass", lambda logits: True)
    before = logits.clone()
    found = chunked_cross_entropy(hidden, unembedding, targets, 64, known=(logits, None) if known else None)
    got = torch.autograd.grad(found[0], (hidden, unembedding))
    assert torch.equal(logits, before)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for value in found:
        assert float(value.detach()) == pytest.approx(float(exact.detach()), rel=tolerance)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert float((a.double() - b.double()).norm()) < tolerance * float(b.double().norm())


@pytest.mark.parametrize("options", [LossOptions(), LossOptions(z_loss=1e-2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_off_the_cpu_never_waits_for_the_device(options, dtype):
    """Tensors on the meta device have no data: anything that would read it on the host raises."""
    hidden, unembedding = (torch.empty(n, 48, device="meta", dtype=dtype, requires_grad=True) for n in (300, 200))
    targets = torch.empty(300, device="meta", dtype=torch.int64)
    objective, _ = chunked_cross_entropy(hidden, unembedding, targets, 64, options)
    of_hidden, of_unembedding = torch.autograd.grad(objective, (hidden, unembedding))
    assert (of_hidden.shape, of_unembedding.shape) == (hidden.shape, unembedding.shape)


SHORT: list[Backward] = ["bf16", "int8"]


@pytest.mark.parametrize("levels", [127.0, 63.0])
@pytest.mark.parametrize("chunk", [64, 1000])
def test_the_error_of_an_int8_head_is_that_of_its_roundings(monkeypatch, levels, chunk):
    """Against float64: a step of the softmax for each term, and half a step of the other operand."""
    levels = min(levels, head_gradients.column_levels(torch.device("cpu")))  # 63 where products need that
    monkeypatch.setattr(head_gradients, "column_levels", lambda device: levels)
    hidden, unembedding, targets = problem(dtype=torch.float32)
    exact_hidden, exact_unembedding = (x.detach().double().requires_grad_() for x in (hidden, unembedding))
    exact, _ = cross_entropy(exact_hidden, exact_unembedding, targets)
    loss, reported = chunked_cross_entropy(hidden, unembedding, targets, chunk, backward="int8")
    assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    assert float(reported) == pytest.approx(float(exact.detach()), rel=1e-6)
    wanted = torch.autograd.grad(exact, (exact_hidden, exact_unembedding))
    found = torch.autograd.grad(loss, (hidden, unembedding))

    x, w = hidden.detach().double(), unembedding.detach().double()
    valid = targets != -100
    softmax = (x @ w.T).softmax(dim=1) * (valid / valid.sum()).unsqueeze(1)
    step = softmax.amax(dim=1, keepdim=True) / levels
    of_w, of_x = w.abs().amax(dim=0) / levels, (x * step).abs().amax(dim=0) / levels
    bounds = (
        step * w.abs().sum(dim=0) + 0.5 * of_w * (softmax + step).sum(dim=1, keepdim=True),
        (step * x.abs()).sum(dim=0)
        + 0.5 * of_x * (softmax / step.clamp(min=1e-30) + valid.unsqueeze(1)).sum(0)[:, None],
    )
    for a, b, bound in zip(found, wanted, bounds, strict=True):
        assert ((a - b).abs() <= 1.001 * bound + 1e-7).all()
        assert float((a - b).norm() / b.norm()) < 0.04 * 127 / levels
        assert not torch.equal(a, b.float())


def test_a_bf16_head_rounds_the_operands_of_its_gradients_and_their_sums():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    loss, _ = chunked_cross_entropy(hidden, unembedding, targets, 100, backward="bf16")
    found = torch.autograd.grad(loss, (hidden, unembedding))
    x, w = hidden.detach().double(), unembedding.detach().double()
    valid = targets != -100
    one_hot = torch.nn.functional.one_hot(targets.clamp(min=0), len(w))
    g = ((x @ w.T).softmax(dim=1) - one_hot) * (valid / valid.sum()).unsqueeze(1)
    for a, b, terms in ((found[0], g @ w, g.abs() @ w.abs()), (found[1], g.T @ x, g.T.abs() @ x.abs())):
        assert ((a - b).abs() <= 4 * 2**-9 * terms + 1e-7).all()
        assert not torch.equal(a, b.float())


@pytest.mark.parametrize("backward", SHORT)
def test_known_logits_serve_a_short_head_too(backward):
    hidden, unembedding, targets = problem(dtype=torch.float32)
    kept = torch.arange(0, len(targets), 2)
    known = (hidden @ unembedding.T).detach(), kept
    before, rows = known[0].clone(), hidden.detach()[kept].requires_grad_()
    arguments = rows, unembedding, targets[kept], 32
    exact, reported = chunked_cross_entropy(*arguments, known=known)
    short, also_reported = chunked_cross_entropy(*arguments, known=known, backward=backward)
    assert torch.equal(known[0], before)
    torch.testing.assert_close((short, also_reported), (exact, reported), rtol=1e-6, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(loss, (rows, unembedding)) for loss in (short, exact)), strict=True):
        assert float((a - b).norm() / b.norm()) < 0.04


def test_rows_of_an_int8_head_have_the_same_bits_in_any_chunk():
    hidden, unembedding, targets = problem(dtype=torch.float32)
    known, gradients = ((hidden @ unembedding.T).detach(), None), []
    for chunk in (1, 64, 1000):
        loss, _ = chunked_cross_entropy(hidden, unembedding, targets, chunk, known=known, backward="int8")
        gradients.append(torch.autograd.grad(loss, hidden)[0])
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])


@pytest.mark.parametrize("backward", SHORT)
def test_a_short_head_of_no_row_of_one_row_and_of_ignored_rows(backward):
    hidden, unembedding, targets = problem(dtype=torch.float32)
    for rows, ignored in ((slice(0), False), (slice(1, 2), False), (slice(5), True)):
        wanted_targets = torch.full_like(targets, -100)[rows] if ignored else targets[rows]
        (loss, _), (exact, _) = (
            chunked_cross_entropy(hidden[rows], unembedding, wanted_targets, 64, backward=form)
            for form in (backward, "exact")
        )
        assert float(loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
        for a, b in zip(*(torch.autograd.grad(x, (hidden, unembedding)) for x in (loss, exact)), strict=True):
            assert float((a - b).norm()) <= 0.05 * float(b.norm())


@pytest.mark.parametrize("backward", SHORT)
def test_a_logit_that_is_not_finite_is_seen_in_the_gradients_of_a_short_head(backward):
    hidden, unembedding, targets = problem(dtype=torch.float32)
    hidden.data[5, 3] = float("nan")
    loss, _ = chunked_cross_entropy(hidden, unembedding, targets, 64, backward=backward)
    of_hidden, of_unembedding = torch.autograd.grad(loss, (hidden, unembedding))
    assert loss.isnan()
    assert not of_hidden[5].isfinite().any()
    assert not of_unembedding.isfinite().all()


def test_only_plain_losses_in_float32_with_a_gradient_have_a_short_head(monkeypatch):
    hidden, unembedding, targets = problem(dtype=torch.float32)

    def outcome(backward, dtype=torch.float32, options=LossOptions(), gradient=True):
        inputs = hidden.detach().to(dtype).requires_grad_(gradient), unembedding.detach().requires_grad_(gradient)
        loss, _ = chunked_cross_entropy(*inputs, targets, 64, options, backward=backward)
        return (loss.detach(), *torch.autograd.grad(loss, inputs)) if gradient else (loss,)

    def same(**arguments) -> bool:
        pairs = zip(outcome("int8", **arguments), outcome("exact", **arguments), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)

    assert not same()
    assert same(dtype=torch.bfloat16)
    assert same(options=LossOptions(z_loss=0.01))
    assert same(gradient=False)
    monkeypatch.setattr(losses, "MAX_TERMS", 199)  # more terms might not fit into 32 bits
    assert same()
