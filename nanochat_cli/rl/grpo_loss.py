"""The policy objective of GRPO: clipped, per token, with masks, a cap on ratios and an optional KL term.

Pure functions of log-probabilities; know nothing of rollouts and rewards. Formulas:
GRPO arXiv:2402.03300 (eq. 3, 4), Dr. GRPO arXiv:2503.20783, DAPO arXiv:2503.14476, dual clip arXiv:1912.09729.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.training.losses import token_losses

Aggregation = Literal["token", "sequence", "constant"]


@dataclass(frozen=True)
class PolicyLossOptions:
    """How tokens are clipped and averaged. Raises ConfigError for a value out of range."""

    clip_low: float = 0.2
    """A ratio below 1 − clip_low is not pushed further down."""
    clip_high: float = 0.2
    """A ratio above 1 + clip_high is not pushed further up (DAPO: higher than clip_low)."""
    ratio_cap: float = 3.0
    """A ratio above it has no gradient whatever its advantage: the guard against rollouts of an old policy."""
    kl_weight: float = 0.0
    """Weight of KL(policy ‖ reference); 0: there is no reference."""
    aggregation: Aggregation = "token"
    """`token`: mean over all tokens; `sequence`: mean of the means of sequences (GRPO); `constant`: divided by
    sequences × `max_length` (Dr. GRPO)."""
    max_length: int | None = None
    """Most tokens of a completion; for `constant`."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("clip_low", 0 < self.clip_low < 1, "above 0, below 1"),
            ("clip_high", 0 < self.clip_high < math.inf, "above 0"),
            ("ratio_cap", 1 + self.clip_high <= self.ratio_cap < math.inf, "1 + clip_high or more"),
            ("kl_weight", 0 <= self.kl_weight < math.inf, "0 (off) or more"),
            ("aggregation", self.aggregation in ("token", "sequence", "constant"), "token, sequence or constant"),
            ("max_length", self.max_length is None or self.max_length > 0, "1 or more"),
            (
                "max_length",
                self.aggregation != "constant" or self.max_length is not None,
                "aggregation constant needs it",
            ),
        ):
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name)} is out of range: {allowed}")


DEFAULT = PolicyLossOptions()


class PolicyLoss(NamedTuple):
    loss: Tensor
    """0-dim; to minimise."""
    metrics: dict[str, Tensor]
    """0-dim tensors without gradient, averages over the tokens of the mask."""


def policy_loss(
    log_probabilities: Tensor,
    old_log_probabilities: Tensor,
    advantages: Tensor,
    mask: Tensor,
    options: PolicyLossOptions = DEFAULT,
    *,
    reference_log_probabilities: Tensor | None = None,
    divisor: Tensor | float | None = None,
) -> PolicyLoss:
    """−Σ min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A) + kl_weight · KL over the tokens of the mask, averaged.

    log_probabilities: float [B, T], of the tokens drawn, with gradient. old_log_probabilities: [B, T], by the policy
    that drew them. advantages: [B], one per completion. mask: bool [B, T], which tokens the policy drew; values
    elsewhere are ignored, even NaN. ρ = exp(new − old) is capped at `ratio_cap`, which for a negative advantage is the
    dual clip. KL is estimated per token as exp(d) − d − 1 with d = reference − new.
    divisor: that of the whole batch (`loss_divisor`) where this is one micro-batch of it, so that losses add up.
    Raises ValueError when shapes differ or the reference is missing.
    """
    _check_shapes(log_probabilities, old_log_probabilities, advantages, mask)
    log_ratio = torch.where(mask, log_probabilities - old_log_probabilities.detach(), 0.0)
    ratio = log_ratio.clamp(max=math.log(options.ratio_cap)).exp()
    advantage = advantages.detach().unsqueeze(1)
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    token_loss = -torch.minimum(ratio * advantage, clipped * advantage)
    metrics = _metrics(log_ratio.detach(), advantage, mask, options)
    if options.kl_weight:
        if reference_log_probabilities is None:
            raise ValueError("kl_weight needs reference_log_probabilities")
        distance = torch.where(mask, reference_log_probabilities.detach() - log_probabilities, 0.0)
        divergence = distance.exp() - distance - 1
        token_loss = token_loss + options.kl_weight * divergence
        metrics["policy/kl_reference"] = _mean(divergence.detach(), mask)
    weights = token_weights(mask, options).to(token_loss.dtype)
    total = loss_divisor(mask, options) if divisor is None else divisor
    return PolicyLoss((token_loss * weights).sum() / total, metrics)


def token_weights(mask: Tensor, options: PolicyLossOptions = DEFAULT) -> Tensor:
    """The weights of tokens before the division by `loss_divisor`: float64 [B, T], 0 outside the mask."""
    weights = mask.double()
    if options.aggregation == "sequence":
        weights = weights / mask.sum(dim=1, keepdim=True).clamp(min=1)
    return weights


def loss_divisor(mask: Tensor, options: PolicyLossOptions = DEFAULT) -> Tensor:
    """The divisor of the weighted sum over tokens, float32 0-dim, at least 1. mask: bool [B, T]."""
    if options.aggregation == "token":
        return mask.sum().clamp(min=1).float()
    sequences = mask.new_tensor(len(mask), dtype=torch.float32)
    return sequences * options.max_length if options.aggregation == "constant" and options.max_length else sequences


def completion_mask(prompt_lengths: Tensor, lengths: Tensor, width: int) -> Tensor:
    """Which predictions are of tokens that the policy drew: bool [B, width].

    prompt_lengths, lengths: int64 [B], tokens of the prompt and of prompt + completion (its end token included).
    Prediction t is of token t + 1, so sequences [B, width + 1] have `width` predictions.
    """
    target = torch.arange(1, width + 1, device=lengths.device)
    return (target >= prompt_lengths.unsqueeze(1)) & (target < lengths.unsqueeze(1))


def token_log_probabilities(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target, float32 [B, T]; 0 where the target is -100.

    logits: float [B, T, V]; targets: int64 [B, T]; temperature: the one that the rollouts were drawn with, above 0.
    """
    _, losses = token_losses(logits.flatten(0, 1).float() / temperature, targets.flatten())
    return -losses.view_as(targets)


def _metrics(log_ratio: Tensor, advantage: Tensor, mask: Tensor, options: PolicyLossOptions) -> dict[str, Tensor]:
    high = (log_ratio > math.log1p(options.clip_high)) & (advantage > 0)
    low = (log_ratio < math.log1p(-options.clip_low)) & (advantage < 0)
    return {
        "policy/ratio": _mean(log_ratio.exp(), mask),
        "policy/kl_old": _mean(torch.expm1(log_ratio) - log_ratio, mask),
        "policy/clipped_low": _mean(low, mask),
        "policy/clipped_high": _mean(high, mask),
        "policy/capped": _mean(log_ratio > math.log(options.ratio_cap), mask),
    }


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask; 0 when it is empty."""
    return torch.where(mask, values.float(), 0.0).sum() / mask.sum().clamp(min=1)


def _check_shapes(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> None:
    if new.dim() != 2 or old.shape != new.shape or mask.shape != new.shape or advantages.shape != new.shape[:1]:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (new, old, advantages, mask))
        raise ValueError(f"new, old, advantages and mask must be [B, T], [B, T], [B] and [B, T], not {shapes}")
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask must be bool, not {mask.dtype}")
