"""Next-token cross-entropy without ever holding all logits.

`cross_entropy` is the definition: whole logits, plain autograd. `chunked_cross_entropy` computes the same
number and the same gradients a few hundred tokens at a time, the gradients already in the forward pass, so
that logits exist for one chunk only and are not computed twice (the idea of Liger's fused linear
cross-entropy, arXiv:2410.10989).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_kernels import Backward
from nanochat_kernels.head_gradients import MAX_TERMS, HeadGradients
from nanochat_kernels.operations import cross_entropy_gradient
from nanochat_kernels.reference.cross_entropy import softmax_gradient

IGNORE = -100


@dataclass(frozen=True)
class LossOptions:
    """Label smoothing ε, z-loss weight on logsumexp² (arXiv:2204.02311) and entropy bonus; 0 means absent."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    entropy_weight: float = 0.0

    @property
    def plain(self) -> bool:
        return not (self.label_smoothing or self.z_loss or self.entropy_weight)


PLAIN = LossOptions()


def token_losses(logits: Tensor, targets: Tensor, options: LossOptions = PLAIN) -> tuple[Tensor, Tensor]:
    """Per-token objective and per-token cross-entropy, float32 [N] each, 0 where target is -100.

    logits: [N, V]; targets: int64 [N].
    """
    logits = logits.float()
    log_probabilities = logits.log_softmax(dim=-1)
    valid = targets != IGNORE
    picked = log_probabilities.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    cross_entropy_ = torch.where(valid, -picked, 0.0)
    if options.plain:
        return cross_entropy_, cross_entropy_
    objective = -picked * (1 - options.label_smoothing) - options.label_smoothing * log_probabilities.mean(dim=-1)
    objective = objective + options.z_loss * logits.logsumexp(dim=-1).square()
    objective = objective + options.entropy_weight * (log_probabilities.exp() * log_probabilities).sum(dim=-1)
    return torch.where(valid, objective, 0.0), cross_entropy_


def cross_entropy(
    hidden: Tensor, unembedding: Tensor, targets: Tensor, options: LossOptions = PLAIN
) -> tuple[Tensor, Tensor]:
    """Mean objective (to train on) and mean cross-entropy (to report) over tokens whose target is not -100.

    hidden: [N, C]; unembedding: [V, C]; targets: int64 [N]. Two 0-dim float32 tensors; only the first has a gradient.
    """
    objective, reported = token_losses(F.linear(hidden, unembedding.to(hidden.dtype)), targets, options)
    count = (targets != IGNORE).sum().clamp(min=1)
    return objective.sum() / count, reported.detach().sum() / count


def chunked_cross_entropy(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    chunk: int = 512,
    options: LossOptions = PLAIN,
    known: tuple[Tensor, Tensor | None] | None = None,
    backward: Backward = "exact",
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` with logits for at most `chunk` tokens at a time; same arguments and results.

    known: logits [M, V] that were computed already, and which of them are those of `hidden`, int64 [N]; None: all.
    backward: number format of the gradients of a plain loss, in float32 on a CPU.
    """
    logits, places = known or (None, None)
    arguments = (hidden, unembedding, targets, chunk, options, logits, places, backward)
    return _ChunkedCrossEntropy.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    unembedding: Tensor,
    targets: Tensor,
    chunk: int = 512,
    *,
    entropy: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy of each token in nats, float32 [N] (0 where target is -100), and the entropy of its prediction.

    hidden: [N, C]; targets: int64 [N]. Logits exist for `chunk` tokens at a time, or are left in `keep`, [N, V] in
    hidden's dtype, for a `chunked_cross_entropy` of some of them. No gradient.
    """
    weight = unembedding.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    entropies = torch.empty_like(losses) if entropy else None
    for start in range(0, len(hidden), chunk):
        piece = slice(start, min(start + chunk, len(hidden)))
        logits = torch.mm(hidden[piece], weight.T, out=None if keep is None else keep[piece]).float()
        total = logits.logsumexp(dim=-1)
        picked = logits.gather(1, targets[piece].clamp(min=0).unsqueeze(1)).squeeze(1)
        losses[piece] = torch.where(targets[piece] != IGNORE, total - picked, 0.0)
        if entropies is not None:
            entropies[piece] = total - ((logits - total.unsqueeze(1)).exp() * logits).sum(dim=-1)
    return losses, entropies


def _in_one_pass(logits: Tensor) -> bool:
    """Whether a kernel replaces logits by their gradient; on a CPU only the short forms of the head do."""
    return logits.device.type != "cpu"


def _plain_chunk(logits: Tensor, targets: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and the gradient of their mean over `count` tokens, in the dtype of logits, often in place."""
    if _in_one_pass(logits):
        losses, gradient = cross_entropy_gradient(logits, targets, count.reciprocal().expand(len(targets)))
        return losses.sum(), gradient
    losses, gradient = softmax_gradient(logits.float(), targets)
    return losses.sum(), gradient.div_(count).to(logits.dtype)


def _general_chunk(logits: Tensor, targets: Tensor, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        objective, reported = token_losses(logits, targets, options)
        (gradient,) = torch.autograd.grad(objective.sum(), logits)
    return objective.detach().sum(), reported.detach().sum(), gradient


def _exact_sums(hidden, weight, targets, pieces, logits_of, count, wants, options):
    """Sums of objective and cross-entropy, and the gradients of the mean objective, in the dtype of `hidden`."""
    objective, reported = hidden.new_zeros(2, dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if wants[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants[1] else None
    for piece in pieces:
        if options.plain:
            plain, gradient = _plain_chunk(logits_of(piece), targets[piece], count)
            loss = plain
        else:
            loss, plain, gradient = _general_chunk(logits_of(piece).float(), targets[piece], options)
            gradient = gradient.div_(count).to(hidden.dtype)
        objective += loss
        reported += plain
        if grad_hidden is not None:
            torch.mm(gradient, weight, out=grad_hidden[piece])
        if grad_weight is not None:
            if gradient.dtype == torch.float32:
                grad_weight.addmm_(gradient.T, hidden[piece])
            else:
                grad_weight += gradient.T @ hidden[piece]
    return objective, reported, grad_hidden, grad_weight


def _is_short(backward: Backward, hidden: Tensor, weight: Tensor, chunk: int, options: LossOptions) -> bool:
    """Whether the head has its gradients in the number format of the ternary layers': plain losses on a CPU do."""
    fits = backward == "bf16" or (backward == "int8" and max(*weight.shape, chunk) <= MAX_TERMS)
    return fits and options.plain and hidden.device.type == "cpu" and hidden.dtype == torch.float32


def _short_sums(hidden, weight, targets, pieces, logits_of, count, wants, backward):
    """`_exact_sums` with gradients in bf16 or int8."""
    factor = (targets != IGNORE) / count
    head = HeadGradients(hidden, weight, targets, factor, backward, wants)
    losses = torch.empty(len(hidden))
    for piece in pieces:
        losses[piece] = head.add(logits_of(piece), piece)
    return losses.sum(), losses.sum(), head.of_hidden, head.of_weight


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, unembedding, targets, chunk, options, known, places, backward):
        weight = unembedding.to(hidden.dtype)
        count = (targets != IGNORE).sum().clamp(min=1)
        pieces = [slice(start, min(start + chunk, len(hidden))) for start in range(0, len(hidden), chunk)]

        def logits_of(piece: slice) -> Tensor:
            if known is None:
                return hidden[piece] @ weight.T
            # a copy, as what comes next overwrites it
            return known[piece].clone() if places is None else known.index_select(0, places[piece])

        short = _is_short(backward, hidden, weight, chunk, options) and any(ctx.needs_input_grad[:2])
        summed = _short_sums if short else _exact_sums
        arguments = (hidden, weight, targets, pieces, logits_of, count, ctx.needs_input_grad[:2])
        objective, reported, *gradients = summed(*arguments, backward if short else options)
        ctx.save_for_backward(*gradients)
        ctx.unembedding_dtype = unembedding.dtype
        reported /= count
        ctx.mark_non_differentiable(reported)
        return objective / count, reported

    @staticmethod
    def backward(ctx, *grad_outputs):
        scale = grad_outputs[0]
        grad_hidden, grad_unembedding = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        if grad_unembedding is not None:
            grad_unembedding = (grad_unembedding * scale).to(ctx.unembedding_dtype)
        return grad_hidden, grad_unembedding, *(None,) * 6


@dataclass
class TokenLoss:
    """chunk: tokens whose logits exist at a time. autocast_dtype: None is float32 throughout. backward: of the head."""

    model: Transformer
    chunk: int = 512
    options: LossOptions = PLAIN
    autocast_dtype: torch.dtype | None = None
    backward: Backward = "exact"

    @classmethod
    def of(cls, model: Transformer, train: TrainConfig, autocast_dtype: torch.dtype | None = None) -> "TokenLoss":
        options = LossOptions(train.label_smoothing, train.z_loss, train.entropy_weight)
        return cls(model, train.loss_chunk, options, autocast_dtype)

    def autocast(self) -> torch.autocast:
        """Around every forward pass."""
        enabled, dtype = self.autocast_dtype is not None, self.autocast_dtype or torch.bfloat16
        return torch.autocast(self.model.device.type, dtype=dtype, enabled=enabled)

    def flat(self, hidden: Tensor) -> Tensor:
        """[B, T, C] to [B · T, C], in the dtype that logits are computed from."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat if self.autocast_dtype is None else flat.to(self.autocast_dtype)

    def __call__(
        self, hidden: Tensor, targets: Tensor, counted: Tensor | None = None, logits: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Objective and cross-entropy, 0-dim: means over the counted tokens that have a target.

        hidden: [B, T, C]; targets: int64 [B, T]; counted: int64 [R], of the B · T tokens, None: all; logits: of all
        tokens, [B · T, V], where they are known.
        """
        flat, flat_targets = self.flat(hidden), targets.reshape(-1)
        known = None if logits is None else (logits, counted)
        if counted is not None:
            flat, flat_targets = flat[counted], flat_targets[counted]
        return chunked_cross_entropy(
            flat, self.model.unembedding, flat_targets, self.chunk, self.options, known, self.backward
        )
