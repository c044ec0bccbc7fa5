"""Sequences to learn from (a prompt, its completion, and the completion's weight), and batches of them.

Knows token ids and numbers. The objectives are in `policy` and `rejection_sampling_tuning`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_cli.rl.grpo_loss import completion_mask

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Trajectory:
    """old_log_probabilities: of the completion's tokens, by the policy that drew them; empty if no policy did."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    advantage: float = 1.0
    old_log_probabilities: tuple[float, ...] = ()


class Batch(NamedTuple):
    """inputs, targets: int64 [B, T]; mask: bool [B, T], the targets of completions; old: float32 [B, T], their
    log-probabilities under the policy that drew them, 0 elsewhere; advantages: float32 [B]."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    old: Tensor
    advantages: Tensor

    def rows(self, start: int, stop: int) -> "Batch":
        """Some of the sequences, no wider than they need."""
        mask = self.mask[start:stop]
        width = int(mask.any(dim=0).nonzero().max()) + 1
        parts = [part[start:stop, :width] for part in (self.inputs, self.targets, self.mask, self.old)]
        return Batch._make([*parts, self.advantages[start:stop]])

    def to(self, device: torch.device) -> "Batch":
        return Batch._make(part.to(device) for part in self)


def collate(trajectories: Sequence[Trajectory]) -> Batch:
    """Pad sequences to the longest with token 0, which nothing reads. Raises ValueError for an empty part."""
    if not all(t.prompt and t.completion for t in trajectories):
        raise ValueError("a trajectory needs a prompt and a completion")
    prompts = torch.tensor([len(t.prompt) for t in trajectories])
    lengths = torch.tensor([len(t.prompt) + len(t.completion) for t in trajectories])
    width = int(lengths.max()) - 1
    tokens = torch.zeros(len(trajectories), width + 1, dtype=torch.int64)
    old = torch.zeros(len(trajectories), width)
    for row, t in enumerate(trajectories):
        tokens[row, : lengths[row]] = torch.tensor([*t.prompt, *t.completion])
        if t.old_log_probabilities:
            old[row, len(t.prompt) - 1 : lengths[row] - 1] = torch.tensor(t.old_log_probabilities)
    advantages = torch.tensor([t.advantage for t in trajectories])
    return Batch(tokens[:, :-1], tokens[:, 1:], completion_mask(prompts, lengths, width), old, advantages)


def batches(items: Sequence[_Item], size: int, epochs: int, seed: int, round_number: int) -> list[list[_Item]]:
    """Batches of `size` items, in another order in every epoch; the order depends only on seed and round.

    The last batch of an epoch may be smaller.
    """
    chosen = []
    for epoch in range(epochs):
        digest = hashlib.sha256(f"order/{seed}/{round_number}/{epoch}".encode()).digest()
        order = np.random.default_rng(int.from_bytes(digest[:8])).permutation(len(items))
        chosen += [[items[index] for index in order[start : start + size]] for start in range(0, len(items), size)]
    return chosen
