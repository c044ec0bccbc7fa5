"""Group-relative advantages: how much better a rollout was than the others of the same prompt.

Pure functions of rewards. `group_advantages` is the definition for the experience library and for the policy alike.
"""

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a group's standard deviation, so that nearly equal rewards are not blown up."""


def group_advantages(rewards: Tensor, *, standardise: bool = False) -> Tensor:
    """Reward less the mean of its group, of the shape and dtype of `rewards`; exactly 0 in a group of equal rewards.

    rewards: float [..., G], the last dimension a group of rollouts of one prompt. standardise: also divide by the
    sample standard deviation of the group plus `EPSILON` (GRPO, arXiv:2402.03300 §4.1.2); without it the form of
    Dr. GRPO (arXiv:2503.20783), which does not weigh prompts by how equal their rewards are.
    Raises ValueError for fewer than two rollouts and for rewards that are not finite.
    """
    if rewards.dim() == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"a group needs at least two rollouts, these rewards have the shape {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError("a reward is not finite")
    advantages = rewards - rewards.mean(dim=-1, keepdim=True)
    if standardise:
        advantages = advantages / (rewards.std(dim=-1, keepdim=True) + EPSILON)
    return torch.where(informative(rewards).unsqueeze(-1), advantages, 0.0)


def informative(rewards: Tensor) -> Tensor:
    """Which groups have rewards that differ, bool [...] of rewards [..., G]; the others have no gradient."""
    return rewards.amax(dim=-1) > rewards.amin(dim=-1)
