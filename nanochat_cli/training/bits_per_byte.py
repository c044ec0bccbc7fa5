"""Loss, perplexity, accuracy and bits per byte on a stream of held-out tokens.

Bits per byte is the figure to compare across tokenizers: the cross-entropy of all tokens that stand for
text, in bits, over the bytes of that text. Special tokens have no bytes and do not count in it; they do
count in loss and perplexity.
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.losses import IGNORE

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class HeldOut:
    """loss: nats per token; accuracy: share of tokens predicted first; tokens, bytes: what was scored."""

    loss: float
    perplexity: float
    accuracy: float
    bits_per_byte: float
    tokens: int
    bytes: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


class _Scored(NamedTuple):
    """Consecutive targets, with those that do not count: losses in nats, float64; lengths in bytes."""

    losses: Tensor
    lengths: Tensor
    correct: Tensor
    valid: Tensor

    def of(self, chosen: Tensor) -> "_Scored":
        return _Scored(*(values[chosen] for values in self))


def evaluate(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    *,
    chunk: int = 2048,
    autocast_dtype: torch.dtype | None = None,
) -> HeldOut:
    """Score batches of (inputs, targets), int64 [B, T] with -100 for positions that do not count.

    token_bytes: [V], the bytes that each token stands for (0 for special tokens). Leaves the model in the mode it
    was in. ValueError when nothing was scored.
    """
    sums = _Sums(model.unembedding.device)
    for part in _score(model, batches, token_bytes, chunk, autocast_dtype):
        sums.add(part)
    found = sums.held_out()
    if found is None:
        raise ValueError("there are no held-out tokens to score")
    return found


def evaluate_groups(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    groups: Tensor,
    names: Sequence[Name],
    *,
    chunk: int = 2048,
) -> tuple[HeldOut, dict[Name, HeldOut]]:
    """As `evaluate`, and the same for each group of targets; a group without text is left out.

    groups: int64, the index into `names` of every target that counts, in the order of the batches.
    """
    device = model.unembedding.device
    total, sums = _Sums(device), [_Sums(device) for _ in names]
    groups, done = groups.to(device), 0
    for part in _score(model, batches, token_bytes, chunk, None):
        total.add(part)
        counted = part.of(part.valid)
        here = groups[done : done + len(counted.losses)]
        done += len(counted.losses)
        for index in here.unique().tolist():
            sums[index].add(counted.of(here == index))
    whole = total.held_out()
    if whole is None:
        raise ValueError("there are no held-out tokens to score")
    found = {name: group.held_out() for name, group in zip(names, sums, strict=True)}
    return whole, {name: group for name, group in found.items() if group is not None}


def merged(parts: Sequence[HeldOut]) -> HeldOut:
    """The figures of several groups together."""
    tokens, n_bytes = sum(part.tokens for part in parts), sum(part.bytes for part in parts)
    loss = sum(part.loss * part.tokens for part in parts) / tokens
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=sum(part.accuracy * part.tokens for part in parts) / tokens,
        bits_per_byte=sum(part.bits_per_byte * part.bytes for part in parts) / n_bytes,
        tokens=tokens,
        bytes=n_bytes,
    )


@torch.no_grad()
def _score(
    model: Transformer,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    chunk: int,
    autocast_dtype: torch.dtype | None,
) -> Iterator[_Scored]:
    """All targets of the batches in order, at most `chunk` at a time."""
    device = model.unembedding.device
    token_bytes = token_bytes.to(device)
    was_training = model.training
    model.eval()
    autocast = torch.autocast(device.type, autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None)
    try:
        for inputs, targets in batches:
            with autocast:
                hidden = model(inputs.to(device)).reshape(-1, model.config.dim)
            flat = targets.to(device).reshape(-1)
            for start in range(0, flat.shape[0], chunk):
                target = flat[start : start + chunk]
                logits = model.logits(hidden[start : start + chunk]).float()
                valid = target != IGNORE
                losses = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE).double()
                lengths = torch.where(valid, token_bytes[target.clamp(min=0)], 0)
                yield _Scored(losses, lengths, (logits.argmax(-1) == target) & valid, valid)
    finally:
        model.train(was_training)


class _Sums:
    """Running sums of scored targets, on the device of the model."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, nats of text tokens, correct
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, bytes

    def add(self, part: _Scored) -> None:
        text = part.losses * (part.lengths > 0)
        self._sums += torch.stack((part.losses.sum(), text.sum(), part.correct.sum().double()))
        self._counts += torch.stack((part.valid.sum(), part.lengths.sum()))

    def held_out(self) -> HeldOut | None:
        """None when there was no text."""
        nats, text_nats, correct = self._sums.tolist()
        tokens, bytes_ = (int(count) for count in self._counts.tolist())
        if tokens == 0 or bytes_ == 0:
            return None
        loss = nats / tokens
        return HeldOut(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            accuracy=correct / tokens,
            bits_per_byte=text_nats / math.log(2) / bytes_,
            tokens=tokens,
            bytes=bytes_,
        )
