"""How evenly a mixture's experts are used, from the counts that its forward passes add up."""

from collections.abc import Sequence

import torch

from nanochat_cli.model.moe import MoE


def measure_load(mixtures: Sequence[MoE]) -> dict[str, float]:
    """Spread and largest of the tokens an expert got, relative to the mean, and the share dropped; one host sync."""
    load = torch.stack([moe.load for moe in mixtures])
    spread = (load.std(dim=1, correction=0) / load.mean(dim=1)).mean()
    largest = (load.amax(dim=1) / load.mean(dim=1)).max()
    dropped = torch.stack([moe.dropped for moe in mixtures]).sum() / load.sum()
    values = torch.stack((spread, largest, dropped)).tolist()
    return dict(zip(("moe/load_spread", "moe/largest_load", "moe/dropped"), values, strict=True))


def forget_load(mixtures: Sequence[MoE]) -> None:
    """Count from zero."""
    for moe in mixtures:
        moe.load.zero_()
        moe.dropped.zero_()
