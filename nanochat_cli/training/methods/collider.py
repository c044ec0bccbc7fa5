"""Collider: which tokens take part in the backward pass (arXiv:2502.00340).

The forward pass is that of every token. Each token has an importance; the least important share is filtered: their
loss does not count, every linear layer of every block computes the gradients of the kept rows alone, and attention
drops the gradients of filtered keys and values. Queries that are kept see all keys, so their gradient is exact.

The importance of a token is its cross-entropy or the entropy of its prediction, both of this model; or its
cross-entropy over that of a reference model; or it is read from a file of `nanochat score`, and known before the
forward pass.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nanochat_cli.config.sections.collider import ColliderConfig
from nanochat_cli.errors import DataError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.losses import IGNORE, token_scores
from nanochat_cli.training.part import MicroBatch, Part, Setup
from nanochat_cli.training.progress import Progress
from nanochat_kernels import KeptRows

LOGITS_BYTES = 2**30
"""Logits that choose the kept tokens are held for the loss of these up to this size; larger ones are computed twice."""

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

    def notice(self, kept: float) -> str | None:
        """The warning when it is due, else None. kept: share of a step's tokens that stayed."""
        if len(self._shares) >= self.WATCHED:
            return None
        self._shares.append(kept)
        mean, wanted = sum(self._shares) / len(self._shares), 1 - self.config.sparsity
        if len(self._shares) < self.WATCHED or mean <= wanted + 1 / STEPS_OF_COUNT:
            return None
        return (
            f"token filtering keeps {mean:.0%} of the tokens, not {wanted:.0%}: collider.threshold = "
            f"{self.config.threshold:g} keeps whatever reaches it; with 1 collider.sparsity alone decides"
        )


class TokenFilter(Part):
    """Makes the layers of a model leave out rows, one micro-batch at a time."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = config = setup.config.collider
        self.linears = list(setup.linears().values())
        self.reference = reference_model(config, setup.model.config.vocab_size, setup.device)
        self.warmup_steps = config.warmup_steps
        self._gather = True
        """Layers may save kept rows alone, if they are known: a compiled forward pass has fixed numbers of rows."""
        self._share = KeptShare(config)
        self._kept: KeptRows | None = None
        self._warm = self._filters = False
        """The warm-up is over; this batch is filtered."""
        self._scores: Tensor | None = None

    @property
    def known_before(self) -> bool:
        """Whether importance is read from a file, so that the choice is made before the forward pass."""
        return self.config.scores is not None and self.config.score != "excess"

    def begin(self, progress: Progress) -> None:
        self._gather = not progress.compiled
        self._warm = progress.warm_ups is None or progress.step >= progress.warm_ups.filtering
        if self.config.scores is not None:
            assert self.setup.data is not None
            self._scores = self.setup.data.scores(progress.step)

    def before_forward(self, micro: MicroBatch) -> None:
        """The layers will read the choice of this micro-batch; where importance is known, it is made already."""
        targets = micro.targets.reshape(-1)
        if micro.rows.start == 0:
            self._filters = self._warm and int(self.config.sparsity * len(targets)) > 0
        if not self._filters:
            return
        if self._kept is None or len(self._kept.rows) != len(targets):
            self._kept = KeptRows.all_of(len(targets), targets.device, known=self.known_before and self._gather)
        self._give(self._kept)
        if self.known_before:
            micro.counted = self._choose(self._given(micro), targets)

    def after_forward(self, micro: MicroBatch) -> None:
        """Scores every token, and chooses by that where it was not chosen before."""
        if not self._filters:
            return
        score, targets, config = self.setup.score, micro.targets.reshape(-1), self.config
        flat, unembedding = score.flat(micro.hidden).detach(), score.model.unembedding.detach()
        shape = len(flat), len(unembedding)
        if math.prod(shape) * flat.element_size() <= LOGITS_BYTES:
            micro.logits = flat.new_empty(shape)
        losses, entropies = token_scores(
            flat, unembedding, targets, score.chunk, entropy=config.score == "entropy", keep=micro.logits
        )
        if not self.known_before:
            importance = losses if entropies is None else entropies
            if config.score == "excess":
                importance = losses - (self._reference_losses(micro) if self._scores is None else self._given(micro))
            micro.counted = self._choose(importance, targets)
        micro.cross_entropy = losses.sum() / (targets != IGNORE).sum().clamp(min=1)

    def add_loss(self, micro: MicroBatch, objective: Tensor, counted: Tensor) -> Tensor:
        if self._filters:
            share = 1.0 if micro.counted is None else len(micro.counted) / micro.targets.numel()
            micro.metrics |= {"collider/kept_fraction": torch.full_like(counted, share), "collider/kept_loss": counted}
        return objective

    def end(self, *, failed: bool) -> None:
        """Layers use every row again, as an evaluation must."""
        self._give(None)

    def after_step(self, progress: Progress, metrics: Mapping[str, float], *, taken: bool) -> None:
        self.backward_share = metrics.get("collider/kept_fraction")
        if self.backward_share is not None and (notice := self._share.notice(self.backward_share)) is not None:
            self.setup.reporter.warn(notice)

    def _choose(self, importance: Tensor, targets: Tensor) -> Tensor | None:
        """Between forward and backward (before both for known scores): importance float32 [N], targets int64 [N].

        Returns the kept rows, int64 [R]; None when all are.
        """
        assert self._kept is not None
        rows = select_kept(importance, targets >= 0, self.config.sparsity, self.config.threshold)
        self._kept.choose(rows)
        return rows if len(rows) < len(targets) else None

    def _given(self, micro: MicroBatch) -> Tensor:
        """Scores of the file for a micro-batch, float32 [N]."""
        assert self._scores is not None
        return self._scores[micro.rows].to(micro.targets.device).reshape(-1)

    @torch.no_grad()
    def _reference_losses(self, micro: MicroBatch) -> Tensor:
        """Cross-entropy of every token under the reference model, float32 [N]."""
        assert self.reference is not None
        score = self.setup.score
        with score.autocast():
            flat = score.flat(self.reference(micro.inputs))
        return token_scores(flat, self.reference.unembedding, micro.targets.reshape(-1), score.chunk)[0]

    def _give(self, kept: KeptRows | None) -> None:
        for layer in self.linears:
            layer.kept = kept


def reference_model(collider: ColliderConfig, vocab_size: int, device: torch.device) -> Transformer | None:
    """The model whose losses are subtracted, on the device and without gradients; None where none is needed.

    vocab_size: of the model that is trained. Raises DataError if the path is not a run or its tokens are others.
    """
    reference = collider.reference_in_use
    if reference is None:
        return None
    from nanochat_cli.formats.open import load_run

    model, tokenizer, _ = load_run(reference)
    if model.config.vocab_size != vocab_size:
        raise DataError(
            f"collider.reference = {reference}: it has {tokenizer.vocab_size} tokens and this model "
            f"{vocab_size}; name a run with the same tokenizer"
        )
    return model.to(device).requires_grad_(False)
