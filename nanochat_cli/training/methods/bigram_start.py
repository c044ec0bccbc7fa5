"""Start from the bigrams of the corpus: embedding and head are fitted to its pair counts before training.

With no block in between, the model computes logits(y | x) = unembedding_y · norm(embedding_x). The expected
cross-entropy of that over *all* pairs of neighbouring tokens of the training split is a sum over the distinct
contexts only, so that one exact full-corpus gradient costs 6 V² C FLOPs, however long the corpus is. A few dozen Adam
steps on it take seconds for a small vocabulary and bring the model to about the entropy of the bigrams; gradient steps
on batches of text need a large part of a short run for that. The blocks then learn what bigrams lack.
Nothing about the model or its export changes: the result is a starting point.

The idea is this project's; docs/training.md has what it is worth, measured, and when not to use it.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat_cli.config.sections.bigram_init import BigramInitConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.part import Part
from nanochat_cli.training.progress import Progress

CONTEXTS_AT_A_TIME = 512


class BigramStart(Part):
    """The fit as the beginning of a run. It counts as training time."""

    def start(self, progress: Progress) -> None:
        setup, config = self.setup, self.setup.config.bigram_init
        assert setup.data is not None
        started = time.perf_counter()
        losses = []
        with setup.reporter.progress("bigram start", config.steps, "steps") as shown:
            bigrams = count_bigrams(setup.data.pieces(), setup.model.config.vocab_size)
            for loss in fit_bigrams(setup.model, bigrams, config):
                losses.append(loss)
                shown.advance(1)
        progress.seconds += time.perf_counter() - started
        setup.reporter.info(
            f"bigram start: {losses[0]:.3f} → {losses[-1]:.3f} nats per token in {progress.seconds:.1f} s"
        )


@dataclass(frozen=True)
class BigramCounts:
    """How often token y follows token x, as sorted sparse rows.

    starts: int64 [V + 1], where the pairs of each context begin; followers: int64 [P]; counts: float32 [P].
    """

    starts: Tensor
    followers: Tensor
    counts: Tensor

    @property
    def vocab_size(self) -> int:
        return self.starts.shape[0] - 1

    @property
    def total(self) -> float:
        """Number of pairs in the corpus."""
        return float(self.counts.sum(dtype=torch.float64))

    def rows(self, first: int, last: int) -> Tensor:
        """Dense counts of contexts first … last − 1: float32 [last − first, V]."""
        dense = torch.zeros(last - first, self.vocab_size, device=self.counts.device)
        pairs = slice(int(self.starts[first]), int(self.starts[last]))
        lengths = self.starts[first + 1 : last + 1] - self.starts[first:last]
        contexts = torch.repeat_interleave(torch.arange(last - first, device=dense.device), lengths)
        dense[contexts, self.followers[pairs]] = self.counts[pairs]
        return dense

    def to(self, device: torch.device) -> "BigramCounts":
        return BigramCounts(self.starts.to(device), self.followers.to(device), self.counts.to(device))


def count_bigrams(pieces: Iterable[NDArray[np.int64]], vocab_size: int) -> BigramCounts:
    """Count the pairs inside each piece of the token stream; consecutive pieces should share one token."""
    codes, counts = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    for piece in pieces:
        found, number = np.unique(piece[:-1] * vocab_size + piece[1:], return_counts=True)
        codes, places = np.unique(np.concatenate((codes, found)), return_inverse=True)
        counts = np.bincount(places, weights=np.concatenate((counts, number)), minlength=len(codes)).astype(np.int64)
    starts = np.searchsorted(codes, np.arange(vocab_size + 1) * vocab_size)
    return BigramCounts(
        torch.from_numpy(starts), torch.from_numpy(codes % vocab_size), torch.from_numpy(counts.astype(np.float32))
    )


def accumulate_gradient(model: Transformer, bigrams: BigramCounts) -> Tensor:
    """Mean cross-entropy of the model without blocks over all pairs, 0-dim, and its gradient into `.grad`.

    A block of contexts at a time: never V × V in memory. The gradient of the logits is known in closed form: count of
    the context × softmax − counts.
    """
    total = bigrams.total
    unembedding = model.unembedding.detach()
    grad_unembedding = torch.zeros_like(unembedding)
    loss = torch.zeros((), dtype=torch.float64, device=unembedding.device)
    for first in range(0, bigrams.vocab_size, CONTEXTS_AT_A_TIME):
        last = min(first + CONTEXTS_AT_A_TIME, bigrams.vocab_size)
        counts = bigrams.rows(first, last)
        occurrences = counts.sum(dim=1, keepdim=True)
        hidden = model.norm(model.embedding.weight[first:last])
        fixed = hidden.detach()
        logits = fixed @ unembedding.T
        normaliser = logits.logsumexp(dim=1, keepdim=True)
        loss += ((occurrences * normaliser).sum() - (counts * logits).sum()).double() / total
        gradient = (logits - normaliser).exp_().mul_(occurrences).sub_(counts).div_(total)
        hidden.backward(gradient @ unembedding)
        grad_unembedding.addmm_(gradient.T, fixed)
    parameter = model.unembedding
    parameter.grad = grad_unembedding if parameter.grad is None else parameter.grad + grad_unembedding
    return loss


def fit_bigrams(model: Transformer, bigrams: BigramCounts, config: BigramInitConfig) -> Iterator[float]:
    """Fit embedding and head; yields the loss (nats per token) of every step.

    Adam with a rate that falls linearly to zero over the second half. The final norm stays as it is.
    """
    bigrams = bigrams.to(model.unembedding.device)
    optimizer = torch.optim.Adam(
        [
            {"params": [model.embedding.weight], "lr": config.embedding_lr},
            {"params": [model.unembedding], "lr": config.head_lr},
        ],
        betas=(0.8, 0.95),
        eps=1e-10,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(config.steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, 2 * (config.steps - step) / config.steps)
        model.zero_grad(set_to_none=True)
        loss = accumulate_gradient(model, bigrams)
        optimizer.step()
        yield float(loss)
    model.zero_grad(set_to_none=True)
