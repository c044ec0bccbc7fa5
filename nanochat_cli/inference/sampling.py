"""From logits to the next token: pure functions of logits [B, V] float32, and the settings they take.

Every row of a batch draws from its own generator, so that what a row becomes does not depend on the
rows beside it. Knows nothing of models or text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError, DataError


@dataclass(frozen=True)
class SamplingConfig:
    """How to continue a prompt. Raises ConfigError for a value out of range."""

    max_tokens: int = 128
    temperature: float = 0.8
    """0: always the most probable token (greedy)."""
    top_k: int = 0
    """Draw from the k most probable tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches p (arXiv:1904.09751); 1: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as probable as the most probable one (arXiv:2407.01082); 0: from all."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already seen (arXiv:1909.05858, §4.1); 1: off."""
    seed: int = 0
    """Row i of a batch draws with seed + i."""
    stop: tuple[str, ...] = ()
    """Strings that end the text; they are not part of it."""

    def __post_init__(self) -> None:
        for name, fits, allowed in (
            ("max_tokens", self.max_tokens >= 0, "0 or more"),
            ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < 1e6, "0 (greedy), or from 1e-6 to 1e6"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "0 (off) or more, at most 1"),
            ("repetition_penalty", 1e-3 <= self.repetition_penalty <= 1e3, "from 0.001 to 1000, 1 is off"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2⁶³ − 1"),
            ("stop", all(self.stop), "strings that are not empty"),
        ):
            if not fits:
                raise ConfigError(f"{name} = {getattr(self, name)} is out of range: {allowed}")


def as_ids(ids: Sequence[int], device: torch.device) -> Tensor | None:
    """Ids that are not to be chosen, as `sample` takes them; None without any."""
    return torch.tensor(ids, dtype=torch.int64, device=device) if len(ids) else None


def generators(seed: int, batch_size: int) -> list[torch.Generator]:
    """One generator per row, on the CPU, so that a seed draws the same numbers for every device."""
    return [torch.Generator().manual_seed(seed + row) for row in range(batch_size)]


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits [B, V] with tokens marked in seen (bool [B, V]) made less probable when penalty > 1."""
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits [B, V] with all but the k largest of a row at -inf; exactly k remain, also among equals."""
    if k <= 0 or k >= logits.shape[-1]:
        return logits
    best = logits.topk(k, dim=-1)
    return torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits [B, V] with all but the nucleus at -inf: the fewest tokens whose probabilities sum to p or more."""
    if p >= 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= p
    outside[..., 0] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """logits [B, V] with tokens less probable than p times the most probable one at -inf."""
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(p), float("-inf"))


def sample(
    logits: Tensor,
    config: SamplingConfig,
    seen: Tensor | None,
    rows: Sequence[torch.Generator],
    never: Tensor | None = None,
    reshape: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The next token of every row: int64 [B].

    logits float [B, V], one generator per row. seen: bool [B, V], needed where repetition is penalised. never: int64,
    ids that are not chosen. reshape: the last step from probabilities float64 [B, V] to those that are drawn from. A
    greedy choice draws no random number and reshapes nothing. Raises DataError for logits that are not finite: there is
    no next token then.
    """
    if not torch.isfinite(logits.amax(dim=-1)).all():
        raise DataError("the model's logits are not finite: its weights are damaged, or its training diverged")
    logits = logits.float()
    if never is not None:
        logits = logits.index_fill(-1, never, float("-inf"))
    if config.repetition_penalty == 1 and config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double()  # no penalty and no temperature that is allowed overflows
    if config.repetition_penalty != 1:
        assert seen is not None
        logits = penalise_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    logits = keep_min_p(keep_top_k(logits / config.temperature, config.top_k), config.min_p)
    probabilities = keep_top_p(logits, config.top_p).softmax(dim=-1)
    return draw(probabilities if reshape is None else reshape(probabilities), rows)


def draw(probabilities: Tensor, rows: Sequence[torch.Generator]) -> Tensor:
    """One token per row by inversion of the cumulative distribution; probabilities float64 [B, V]. int64 [B]."""
    uniform = torch.stack([torch.rand(1, generator=row, dtype=torch.float64) for row in rows]).to(probabilities.device)
    cumulative = probabilities.cumsum(dim=-1)
    # right=True: the first entry *above* the draw, which therefore never has probability 0.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(-1)


def log_probabilities(logits: Tensor, chosen: Tensor, temperature: float) -> list[float]:
    """Natural, of the tokens chosen int64 [B] under softmax(logits / temperature), or of logits float32 if greedy."""
    scaled = logits / temperature if temperature > 0 else logits
    return scaled.log_softmax(dim=-1).gather(1, chosen[:, None]).squeeze(1).tolist()
