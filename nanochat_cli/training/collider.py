"""Collider: which tokens take part in the backward pass (arXiv:2502.00340).

The forward pass is that of every token. Each token has an importance; the least important share is filtered: their
loss does not count, every linear layer of every block computes the gradients of the kept rows alone, and attention
drops the gradients of filtered keys and values. Queries that are kept see all keys, so their gradient is exact.

Knows tokens, scores and layers; where scores come from and what the loss is are the affair of others.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nanochat_cli.config.schema import ColliderConfig
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_kernels import KeptRows

STEPS_OF_COUNT = 16
"""With a threshold the number of kept tokens is rounded up to this many-th parts of a batch: few different shapes."""


def select_kept(importance: Tensor, valid: Tensor, sparsity: float, threshold: float = 1.0) -> Tensor:
    """Indices of the tokens that are kept, ascending: int64 [R].

    importance: float32 [N]; valid: bool [N], whether a token has a target (those without one go first). The lowest
    floor(sparsity · N) are filtered, but none whose min-max-normalised importance is at least `threshold`. With
    threshold 1 the count is the same for every batch and nothing is read by the host.
    """
    n = len(importance)
    filtered = int(sparsity * n)
    order = importance.masked_fill(~valid, -torch.inf).argsort(stable=True)
    if threshold < 1:
        low, high = (importance.where(valid, other).aminmax() for other in (torch.inf, -torch.inf))
        normalised = (importance - low.min) / (high.max - low.min).clamp(min=1e-12)
        below = int(((normalised < threshold) | ~valid).sum())  # the one host read, between forward and backward
        if below < filtered:
            step = max(1, n // STEPS_OF_COUNT)
            filtered = below // step * step
    return order[filtered:].sort().values


class KeptShare:
    """Notices, once, that the threshold keeps more tokens than `sparsity` would leave."""

    WATCHED = 10
    """Filtered steps that are averaged before it says so."""

    def __init__(self, config: ColliderConfig) -> None:
        self.config = config
        self._shares: list[float] = []

    def notice(self, kept: float | None) -> str | None:
        """kept: the share of a step's tokens that stayed, None where nothing was filtered. A line when there is one."""
        if kept is None or len(self._shares) >= self.WATCHED:
            return None
        self._shares.append(kept)
        mean, wanted = sum(self._shares) / len(self._shares), 1 - self.config.sparsity
        if len(self._shares) < self.WATCHED or mean <= wanted + 1 / STEPS_OF_COUNT:
            return None
        return (
            f"token filtering keeps {mean:.0%} of the tokens, not {wanted:.0%}: collider.threshold = "
            f"{self.config.threshold:g} keeps whatever reaches it; with 1 collider.sparsity alone decides"
        )


class TokenFilter:
    """Makes the layers of a model leave out rows, one micro-batch at a time.

    gather: layers may save kept rows alone, where the choice is made before the forward pass.
    """

    def __init__(self, config: ColliderConfig, linears: Iterable[BitLinear], *, gather: bool = True) -> None:
        self.config = config
        self.linears = list(linears)
        self.gather = gather
        self._kept: KeptRows | None = None

    @property
    def known_before(self) -> bool:
        """Whether importance is read from a file, so that the choice is made before the forward pass."""
        return self.config.scores is not None and self.config.score != "excess"

    def filters(self, n: int) -> bool:
        """Whether any of `n` tokens can be filtered at all."""
        return int(self.config.sparsity * n) > 0

    def begin(self, n: int, device: torch.device) -> None:
        """Before the forward pass of `n` tokens: the layers will read the choice of this micro-batch."""
        if self._kept is None or len(self._kept.rows) != n:
            self._kept = KeptRows.all_of(n, device, known=self.known_before and self.gather)
        self._give(self._kept)

    def choose(self, importance: Tensor, targets: Tensor) -> Tensor | None:
        """Between forward and backward (before both for known scores): importance float32 [N], targets int64 [N].

        Returns the kept rows, int64 [R]; None when all are.
        """
        assert self._kept is not None
        rows = select_kept(importance, targets >= 0, self.config.sparsity, self.config.threshold)
        self._kept.choose(rows)
        return rows if len(rows) < len(targets) else None

    def end(self) -> None:
        """Layers use every row again, as an evaluation must."""
        self._give(None)

    def _give(self, kept: KeptRows | None) -> None:
        for layer in self.linears:
            layer.kept = kept
