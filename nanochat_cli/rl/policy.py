"""Policy GRPO: answers better than their group's mean become more probable, worse ones less (arXiv:2402.03300).

On-policy: the rollouts of a round are drawn from the weights that the round begins with. When the policy has diverged
from those of a batch by more than `grpo.max_divergence`, the round ends, and the next one draws new rollouts. Until
then the objective's `ratio_cap` bounds the effect of a single token.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nanochat_cli.config.sections.grpo import GRPOConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.inference.generate import encode_prompt
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.rl.advantages import group_advantages
from nanochat_cli.rl.grpo_loss import PolicyLossOptions, loss_divisor, policy_loss
from nanochat_cli.rl.judging import Judged
from nanochat_cli.rl.learner import Learner, Objective, completion_log_probabilities
from nanochat_cli.rl.trajectories import Batch, Trajectory, batches, collate


class PolicyObjective:
    """`grpo_loss.policy_loss` at the temperature of the rollouts. reference: the model of the KL term, if any."""

    def __init__(
        self, config: GRPOConfig, reference: Transformer | None = None, autocast_dtype: torch.dtype | None = None
    ) -> None:
        self.temperature = config.temperature
        self.options = PolicyLossOptions(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            ratio_cap=config.ratio_cap,
            kl_weight=config.kl_weight,
            aggregation=config.aggregation,
            max_length=config.max_tokens,
        )
        self.reference, self.autocast_dtype = reference, autocast_dtype

    def divisor(self, batch: Batch) -> Tensor:
        return loss_divisor(batch.mask, self.options)

    def __call__(self, log_probabilities: Tensor, part: Batch, divisor: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        reference = None
        if self.reference is not None:
            with torch.no_grad():
                reference = completion_log_probabilities(self.reference, part, self.temperature, self.autocast_dtype)
        return policy_loss(
            log_probabilities,
            part.old,
            part.advantages,
            part.mask,
            self.options,
            reference_log_probabilities=reference,
            divisor=divisor,
        )


def trajectories_of(groups: Sequence[Sequence[Judged]], tokenizer: Tokenizer, *, standardise: bool) -> list[Trajectory]:
    """The rollouts of groups whose rewards differ, each with its advantage."""
    trajectories = []
    for group in groups:
        rewards = torch.tensor([judged.reward.total for judged in group], dtype=torch.float64)
        for judged, advantage in zip(group, group_advantages(rewards, standardise=standardise).tolist(), strict=True):
            completion = judged.rollout.completion
            if advantage and completion.tokens:
                prompt = tuple(encode_prompt(tokenizer, judged.rollout.prompt.text))
                trajectories.append(Trajectory(prompt, completion.tokens, advantage, completion.log_probabilities))
    return trajectories


def learn_round(
    learner: Learner,
    objective: Objective,
    trajectories: Sequence[Trajectory],
    config: GRPOConfig,
    seed: int,
    round_number: int,
    before_each: Callable[[int, int], None] = lambda _, __: None,
) -> dict[str, float]:
    """One round of updates; returns means of their metrics. before_each: called with the updates done and planned.

    Where the objective tells the divergence from the policy of the rollouts, stale batches end the round.
    """
    planned = batches(trajectories, config.batch_size, config.epochs, seed, round_number)[: config.updates]
    taken: list[dict[str, float]] = []
    for number, chosen in enumerate(planned):
        before_each(number, len(planned))
        metrics = learner.gradient(collate(chosen), objective)
        if metrics.get("policy/kl_old", 0.0) > config.max_divergence:
            learner.discard()
            break
        taken.append(metrics | learner.update(metrics["loss/objective"]))
    counts: dict[str, float] = {"policy/updates": len(taken)}
    if isinstance(objective, PolicyObjective):
        counts["policy/stale_batches"] = len(planned) - len(taken)
    return means(taken) | counts


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of every name over rows with the same names; empty without rows."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}
