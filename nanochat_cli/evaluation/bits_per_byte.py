"""Loss, perplexity, accuracy and bits per byte on a stream of held-out tokens.

Bits per byte is the figure to compare across tokenizers: the cross-entropy of all tokens that stand for
text, in bits, over the bytes of that text. Special tokens have no bytes and do not count in it; they do
count in loss and perplexity.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.losses import IGNORE


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


@torch.no_grad()
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
    device = model.unembedding.device
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, nats of text tokens, correct
    counts = torch.zeros(2, dtype=torch.int64, device=device)  # tokens, bytes
    was_training = model.training
    model.eval()
    for inputs, targets in batches:
        with torch.autocast(device.type, dtype=autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None):
            hidden = model(inputs.to(device)).reshape(-1, model.config.dim)
        flat = targets.to(device).reshape(-1)
        for start in range(0, flat.shape[0], chunk):
            rows = slice(start, start + chunk)
            target = flat[rows]
            logits = model.logits(hidden[rows]).float()
            valid = target != IGNORE
            losses = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE).double()
            lengths = torch.where(valid, token_bytes[target.clamp(min=0)], 0)
            sums += torch.stack(
                (losses.sum(), (losses * (lengths > 0)).sum(), ((logits.argmax(-1) == target) & valid).sum().double())
            )
            counts += torch.stack((valid.sum(), lengths.sum()))
    model.train(was_training)
    nats, text_nats, correct = sums.tolist()
    tokens, bytes_ = (int(c) for c in counts.tolist())
    if tokens == 0 or bytes_ == 0:
        raise ValueError("there are no held-out tokens to score")
    loss = nats / tokens
    return HeldOut(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        accuracy=correct / tokens,
        bits_per_byte=text_nats / math.log(2) / bytes_,
        tokens=tokens,
        bytes=bytes_,
    )
