"""The policy objective against a gradient derived by hand, a loop in plain Python, and a task that it must learn."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.rl.advantages import group_advantages
from nanochat_cli.rl.grpo_loss import (
    PolicyLossOptions,
    completion_mask,
    loss_divisor,
    policy_loss,
    token_log_probabilities,
)

B, T, V = 6, 5, 7
OPTIONS = [
    PolicyLossOptions(),
    PolicyLossOptions(clip_low=0.1, clip_high=0.3, ratio_cap=1.5),
    PolicyLossOptions(kl_weight=0.3),
    PolicyLossOptions(aggregation="sequence"),
    PolicyLossOptions(aggregation="constant", max_length=9, kl_weight=0.1),
]


class Toy:
    """A softmax policy with free logits, rollouts that an older policy drew, and a mask with empty and full rows."""

    def __init__(self, seed: int, staleness: float = 1.5) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        self.logits = normal(B, T, V).requires_grad_()
        self.tokens = torch.randint(V, (B, T), generator=random)
        self.old = self.picked((self.logits + staleness * normal(B, T, V)).log_softmax(-1)).detach()
        self.reference = self.picked((self.logits + normal(B, T, V)).log_softmax(-1)).detach()
        self.advantages = group_advantages(normal(2, B // 2)).flatten()
        self.mask = completion_mask(torch.tensor([1, 2, 3, 1, 4, 6]), torch.tensor([6, 6, 4, 2, 6, 6]), T)

    def picked(self, log_probabilities: Tensor) -> Tensor:
        return log_probabilities.gather(-1, self.tokens.unsqueeze(-1)).squeeze(-1)

    def new(self) -> Tensor:
        return self.picked(self.logits.log_softmax(-1))

    def loss(self, options: PolicyLossOptions, **more) -> Tensor:
        reference = self.reference if options.kl_weight else None
        arguments = (self.new(), self.old, self.advantages, self.mask, options)
        return policy_loss(*arguments, reference_log_probabilities=reference, **more).loss


def weight_of_tokens(toy: Toy, options: PolicyLossOptions) -> Tensor:
    """The weight of each token, [B, T], written out per aggregation."""
    weights = torch.zeros(B, T, dtype=torch.float64)
    for b, t in itertools.product(range(B), range(T)):
        if toy.mask[b, t]:
            of_sequence = int(toy.mask[b].sum())
            weights[b, t] = {
                "token": 1 / int(toy.mask.sum()),
                "sequence": 1 / (of_sequence * B),
                "constant": 1 / (B * (options.max_length or 1)),
            }[options.aggregation]
    return weights


def by_hand(toy: Toy, options: PolicyLossOptions) -> tuple[float, Tensor]:
    """Loss, and its gradient to the logits: (dL / d log π) (onehot − softmax), token by token."""
    probabilities = toy.logits.detach().softmax(-1)
    weights = weight_of_tokens(toy, options)
    loss, gradient = 0.0, torch.zeros(B, T, V, dtype=torch.float64)
    for b, t in itertools.product(range(B), range(T)):
        advantage, token = float(toy.advantages[b]), int(toy.tokens[b, t])
        log_p = math.log(float(probabilities[b, t, token]))
        ratio = math.exp(log_p - float(toy.old[b, t]))
        if advantage >= 0:
            objective, slope = min(ratio, 1 + options.clip_high) * advantage, ratio < 1 + options.clip_high
        else:
            inside = 1 - options.clip_low < ratio < options.ratio_cap
            objective, slope = min(max(ratio, 1 - options.clip_low), options.ratio_cap) * advantage, inside
        d = float(toy.reference[b, t]) - log_p
        weight = float(weights[b, t])
        loss += weight * (-objective + options.kl_weight * (math.exp(d) - d - 1))
        derivative = weight * (-slope * ratio * advantage + options.kl_weight * (1 - math.exp(d)))
        onehot = torch.eye(V, dtype=torch.float64)[token]
        gradient[b, t] = derivative * (onehot - probabilities[b, t])
    return loss, gradient


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradient_are_those_derived_by_hand(options, seed):
    toy = Toy(seed)
    loss = toy.loss(options)
    (gradient,) = torch.autograd.grad(loss, toy.logits)
    expected_loss, expected_gradient = by_hand(toy, options)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-9)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    assert gradient.abs().max() > 1e-3


def test_rollouts_of_the_toys_reach_every_branch_of_the_clip():
    reached: dict[str, float] = {}
    for toy in (Toy(seed) for seed in range(3)):
        metrics = policy_loss(toy.new(), toy.old, toy.advantages, toy.mask).metrics
        far = (toy.new() - toy.old).exp() > PolicyLossOptions().ratio_cap
        metrics["capped below 0"] = (far & toy.mask & (toy.advantages < 0).unsqueeze(1)).float().mean()
        for name, value in metrics.items():
            reached[name] = reached.get(name, 0) + value.item()
    assert all(reached[name] > 0 for name in ("policy/clipped_low", "policy/clipped_high", "capped below 0"))


def test_on_policy_the_gradient_is_that_of_reinforce_with_a_baseline():
    toy = Toy(4)
    toy.old = toy.new().detach()
    (gradient,) = torch.autograd.grad(toy.loss(PolicyLossOptions()), toy.logits)
    reinforce = -(toy.new() * toy.advantages.unsqueeze(1))[toy.mask].mean()
    (expected,) = torch.autograd.grad(reinforce, toy.logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_outside_the_mask_do_not_matter(options):
    toy = Toy(5)
    whole, junk = toy.loss(options), float("nan")
    new = torch.where(toy.mask, toy.new(), float("-inf")).detach().requires_grad_()
    old, reference = (torch.where(toy.mask, values, junk) for values in (toy.old, toy.reference))
    found = policy_loss(new, old, toy.advantages, toy.mask, options, reference_log_probabilities=reference)
    assert torch.equal(found.loss, whole)
    (gradient,) = torch.autograd.grad(found.loss, new)
    assert torch.equal(gradient[~toy.mask], torch.zeros_like(gradient[~toy.mask]))
    assert gradient.isfinite().all()
    assert all(value.isfinite() for value in found.metrics.values())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_micro_batches_with_the_divisor_of_the_batch_add_up(options):
    toy = Toy(6)
    divisor = loss_divisor(toy.mask, options)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, B)):
        arguments = (toy.new()[rows], toy.old[rows], toy.advantages[rows], toy.mask[rows], options)
        reference = toy.reference[rows]
        parts.append(policy_loss(*arguments, reference_log_probabilities=reference, divisor=divisor).loss)
    torch.testing.assert_close(torch.stack(parts).sum(), toy.loss(options), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_token_of_a_policy_far_away_has_no_gradient_and_no_overflow(advantage):
    new = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -500.0]])  # exp(500) is not a float
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, metrics = policy_loss(new, old, torch.tensor([advantage]), mask)
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite()
    assert gradient.tolist() == [[-advantage / 2, 0.0]]
    assert metrics["policy/capped"] == 0.5


def test_the_penalty_is_zero_at_the_reference_and_positive_elsewhere():
    toy = Toy(7)
    options = PolicyLossOptions(kl_weight=1.0)
    plain = toy.loss(PolicyLossOptions())
    assert toy.loss(options) > plain
    toy.reference = toy.new().detach()
    assert torch.equal(toy.loss(options), plain)


def test_an_empty_mask_is_a_loss_of_zero():
    toy = Toy(8)
    toy.mask = torch.zeros_like(toy.mask)
    loss = toy.loss(PolicyLossOptions())
    loss.backward()
    assert loss == 0
    assert torch.equal(toy.logits.grad, torch.zeros_like(toy.logits))  # pyright: ignore[reportArgumentType]


def test_the_mask_holds_the_tokens_of_the_completion():
    sequences = ["pppccc", "pcxxxx", "ppppcc", "pppppp"]
    prompt_lengths = torch.tensor([text.count("p") for text in sequences])
    lengths = torch.tensor([len(text.rstrip("x")) for text in sequences])
    found = completion_mask(prompt_lengths, lengths, 5)
    assert found.tolist() == [[symbol == "c" for symbol in text[1:]] for text in sequences]


def test_token_log_probabilities_are_those_of_the_tempered_softmax():
    toy = Toy(9)
    logits = toy.logits.detach().float()
    targets = toy.tokens.clone()
    targets[0, 0] = -100
    found = token_log_probabilities(logits, targets, temperature=0.7)
    distribution = torch.distributions.Categorical(logits=logits / 0.7)
    expected = distribution.log_prob(toy.tokens)
    expected[0, 0] = 0
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_low", 0.0),
        ("clip_low", 1.0),
        ("clip_high", 0.0),
        ("ratio_cap", 1.1),
        ("ratio_cap", math.inf),
        ("kl_weight", -1.0),
        ("kl_weight", math.nan),
        ("aggregation", "mean"),
        ("aggregation", "constant"),
        ("max_length", 0),
    ],
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        PolicyLossOptions(**{name: value})


def test_wrong_shapes_a_mask_of_numbers_and_a_missing_reference_are_refused():
    toy = Toy(10)
    new, old, advantages, mask = toy.new(), toy.old, toy.advantages, toy.mask
    with pytest.raises(ValueError, match="must be"):
        policy_loss(new, old, advantages.unsqueeze(1), mask)
    with pytest.raises(ValueError, match="bool"):
        policy_loss(new, old, advantages, mask.long())
    with pytest.raises(ValueError, match="reference"):
        policy_loss(new, old, advantages, mask, PolicyLossOptions(kl_weight=0.1))


# --- a task that it must learn ----------------------------------------------------------------------------------------

CONTEXTS, ARMS, LENGTH, GROUP = 4, 6, 2, 8


def expected_reward(logits: Tensor, answers: Tensor) -> float:
    """Exact: the probability of both right arms, averaged over contexts."""
    probabilities = logits.detach().softmax(-1)
    return probabilities.gather(-1, answers.unsqueeze(-1)).squeeze(-1).prod(dim=-1).mean().item()


def learn(seed: int, options: PolicyLossOptions, *, standardise: bool, updates: int, sign: float = 1.0) -> list[float]:
    """Expected reward before and after 150 batches: two arms in a row, reward 1 only when both are the context's."""
    random = torch.Generator().manual_seed(seed)
    answers = torch.randint(ARMS, (CONTEXTS, LENGTH), generator=random)
    logits = torch.zeros(CONTEXTS, LENGTH, ARMS, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    mask = torch.ones(CONTEXTS * GROUP, LENGTH, dtype=torch.bool)
    contexts = torch.arange(CONTEXTS).repeat_interleave(GROUP)
    curve = [expected_reward(logits, answers)]
    for _ in range(150):
        with torch.no_grad():
            flat = logits[contexts].softmax(-1).flatten(0, 1)
            drawn = torch.multinomial(flat, 1, generator=random).view(-1, LENGTH)
            old = token_log_probabilities(logits[contexts], drawn)
        rewards = (drawn == answers[contexts]).all(dim=1).float().view(CONTEXTS, GROUP)
        advantages = sign * group_advantages(rewards, standardise=standardise).flatten()
        for _ in range(updates):
            optimizer.zero_grad()
            new = token_log_probabilities(logits[contexts], drawn)
            policy_loss(new, old, advantages, mask, options, reference_log_probabilities=old).loss.backward()
            optimizer.step()
    return [*curve, expected_reward(logits, answers)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("options", "standardise", "updates"),
    [
        (PolicyLossOptions(), True, 1),
        (PolicyLossOptions(aggregation="constant", max_length=LENGTH), False, 1),
        (PolicyLossOptions(clip_high=0.28), False, 4),
        (PolicyLossOptions(aggregation="sequence", kl_weight=0.01), True, 2),
    ],
    ids=["GRPO", "Dr. GRPO", "several updates of a batch", "KL"],
)
def test_a_tiny_policy_learns_the_task(options, standardise, updates, seed):
    before, after = learn(seed, options, standardise=standardise, updates=updates)
    assert before == pytest.approx(1 / ARMS**LENGTH)
    assert after >= 0.9


def test_with_the_wrong_sign_it_does_not():
    _, after = learn(0, PolicyLossOptions(), standardise=True, updates=1, sign=-1.0)
    assert after < 0.1
