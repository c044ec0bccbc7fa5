"""One global batch: forward and backward over its micro-batches, and what to do when memory runs out.

The global batch never changes. When a micro-batch does not fit, it is halved and the accumulation doubled, the
batch is started again, and the run says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.config.schema import TrainConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.model.mtp import MTP, shifted_targets
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.collider import TokenFilter
from nanochat_cli.training.losses import IGNORE, LossOptions, chunked_cross_entropy, token_scores
from nanochat_cli.training.phases import NoPhases, Phases

LOGITS_BYTES = 2**30
"""Logits that choose the kept tokens are held for the loss of these up to this size; larger ones are computed twice."""


@dataclass(frozen=True)
class BatchLoss:
    """objective: what was minimised; cross_entropy: nats per token, the headline. 0-dim float32, on the device.

    ahead: cross-entropy of each token further ahead, of multi-token prediction; [0] without it. filtering: with token
    filtering, share of kept tokens and their mean cross-entropy; [0] without it. With it, `ahead` is over kept tokens.
    """

    objective: Tensor
    cross_entropy: Tensor
    ahead: Tensor
    filtering: Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's out-of-memory error and for the CPU allocator's plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class GradientStep:
    """Accumulates the gradient of a global batch into the parameters' `.grad`."""

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        autocast_dtype: torch.dtype | None,
        warn: Callable[[str], None],
        mtp: MTP | None = None,
        collider: TokenFilter | None = None,
        reference: Transformer | None = None,
    ) -> None:
        self.model = model
        self.mtp = mtp
        self.collider = collider
        self.reference = reference
        """Whose cross-entropy is subtracted from the model's to give a token's importance."""
        self.filtering = False
        """Whether this step filters: not in the warm-up."""
        self.progress = 0.0
        """Share of the run that is done, for weights that depend on it."""
        self.phases: Phases = NoPhases()
        self.micro_batch = config.batch_size
        self.chunk = config.loss_chunk
        self.options = LossOptions(config.label_smoothing, config.z_loss, config.entropy_weight)
        self.autocast_dtype = autocast_dtype
        self.warn = warn
        self.device = next(model.parameters()).device

    def __call__(
        self, inputs: Tensor, targets: Tensor, zero_grad: Callable[[], None], scores: Tensor | None = None
    ) -> BatchLoss:
        """inputs, targets: int64 [B, T], the whole global batch, on the device. Gradients start from zero.

        scores: float32 [B, T], read from a file: importance of the tokens, or what is subtracted to give it.
        """
        counts = [counter for _, moe in self.model.mixtures() for counter in (moe.load, moe.dropped)]
        before = [counter.clone() for counter in counts]
        while True:
            zero_grad()
            try:
                return self._accumulate(inputs, targets, scores)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)
                for counter, value in zip(counts, before, strict=True):  # what was done is done once more
                    counter.copy_(value)
            finally:
                if self.collider is not None:
                    self.collider.end()

    def _accumulate(self, inputs: Tensor, targets: Tensor, scores: Tensor | None) -> BatchLoss:
        total = inputs.shape[0]
        smallest = min(self.micro_batch, total) * inputs.shape[1]
        filtering = self.collider is not None and self.filtering and self.collider.filters(smallest)
        sums = BatchLoss(
            torch.zeros((), device=self.device),
            torch.zeros((), device=self.device),
            torch.zeros(0 if self.mtp is None else self.mtp.n_tokens, device=self.device),
            torch.zeros(2 if filtering else 0, device=self.device),
        )
        for start in range(0, total, self.micro_batch):
            rows = slice(start, min(start + self.micro_batch, total))
            share = (rows.stop - rows.start) / total
            for _, moe in self.model.mixtures():
                moe.loss_scale.fill_(share)
            with self.phases("forward"):
                if filtering:
                    known = None if scores is None else scores[rows].reshape(-1)
                    part = self._filtered(inputs[rows], targets[rows], known)
                else:
                    part = self._forward(inputs[rows], targets[rows])
            with self.phases("backward"):
                (part.objective * share).backward()
            for of_all, of_part in zip(vars(sums).values(), vars(part).values(), strict=True):
                of_all += of_part.detach() * share
        return sums

    def _forward(self, inputs: Tensor, targets: Tensor) -> BatchLoss:
        """Every token takes part in both passes."""
        hidden, ahead = self._hidden_states(inputs, targets)
        objective, cross_entropy = self._loss(hidden, targets)
        objective, reported = self._add_losses_ahead(objective, ahead, targets, None)
        return BatchLoss(objective, cross_entropy, reported, cross_entropy.new_zeros(0))

    def _filtered(self, inputs: Tensor, targets: Tensor, scores: Tensor | None) -> BatchLoss:
        """Every token takes part in the forward pass, kept ones alone in the objective and the backward pass."""
        collider = self.collider
        assert collider is not None
        flat_targets, kept = targets.reshape(-1), None
        collider.begin(len(flat_targets), self.device)
        if collider.known_before:
            assert scores is not None
            kept = collider.choose(scores, flat_targets)
        hidden, ahead = self._hidden_states(inputs, targets)
        flat = self._flat(hidden)
        entropy = collider.config.score == "entropy"
        shape = len(flat), self.model.unembedding.shape[0]
        logits = flat.new_empty(shape) if math.prod(shape) * flat.element_size() <= LOGITS_BYTES else None
        losses, entropies = token_scores(
            flat.detach(), self.model.unembedding.detach(), flat_targets, self.chunk, entropy=entropy, keep=logits
        )
        if not collider.known_before:
            importance = losses if entropies is None else entropies
            if collider.config.score == "excess":
                importance = losses - (self._reference_losses(inputs, flat_targets) if scores is None else scores)
            kept = collider.choose(importance, flat_targets)
        objective, of_kept = self._loss(hidden, targets, kept, logits)
        del logits
        objective, reported = self._add_losses_ahead(objective, ahead, targets, kept)
        cross_entropy = losses.sum() / (flat_targets != IGNORE).sum().clamp(min=1)
        share = 1.0 if kept is None else len(kept) / len(flat_targets)
        return BatchLoss(objective, cross_entropy, reported, torch.stack((torch.full_like(of_kept, share), of_kept)))

    def _hidden_states(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            hidden = self.model(inputs)
            return hidden, [] if self.mtp is None else self.mtp.hidden_states(self.model, hidden, targets)

    @torch.no_grad()
    def _reference_losses(self, inputs: Tensor, flat_targets: Tensor) -> Tensor:
        assert self.reference is not None
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            hidden = self._flat(self.reference(inputs))
        return token_scores(hidden, self.reference.unembedding, flat_targets, self.chunk)[0]

    def _add_losses_ahead(
        self, objective: Tensor, ahead: list[Tensor], targets: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The objective with those of multi-token prediction, and their cross-entropies."""
        if self.mtp is None:
            return objective, objective.new_zeros(0)
        reported = []
        for i, (states, weight) in enumerate(zip(ahead, self.mtp.weights(self.progress), strict=True)):
            auxiliary, plain = self._loss(states, shifted_targets(targets, i + 1), kept)
            objective = objective + weight * auxiliary
            reported.append(plain)
        return objective, torch.stack(reported)

    def _flat(self, hidden: Tensor) -> Tensor:
        """[B, T, C] to [B · T, C], in the dtype that logits are computed from."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.autocast_dtype is None else flat.to(self.autocast_dtype)

    def _loss(
        self, hidden: Tensor, targets: Tensor, kept: Tensor | None = None, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Objective and cross-entropy of hidden [B, T, C], over all tokens or the kept ones, int64 [R].

        logits: of all tokens, [B · T, V], where they are known.
        """
        flat, flat_targets = self._flat(hidden), targets.reshape(-1)
        known = None if logits is None else (logits, kept)
        if kept is not None:
            flat, flat_targets = flat[kept], flat_targets[kept]
        return chunked_cross_entropy(flat, self.model.unembedding, flat_targets, self.chunk, self.options, known)

    def _halve(self, error: BaseException) -> None:
        if self.micro_batch == 1:
            raise ConfigError(
                "out of memory with one sequence per micro-batch; lower train.seq_len or the model, "
                "or set train.gradient_checkpointing = true"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = self.micro_batch
        self.micro_batch = max(1, before // 2)
        self.warn(f"out of memory: micro-batch {before} → {self.micro_batch}, the global batch stays the same")
