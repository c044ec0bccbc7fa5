"""Mixtures of sources: from which of them each window of a batch comes.

Batches draw from the sources by weight. In every BLOCK consecutive places of the endless order, each source has its
exact share, in an order of their own; so the source of a place, and the number of its windows before it, are a function
of (seed, place), as everything in `data.batches`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanochat_cli.data.order import permuted
from nanochat_cli.errors import DataError

if TYPE_CHECKING:
    from nanochat_cli.data.manifest import Manifest

BLOCK = 4096
TOO_OFTEN = 4.0
"""Epochs of a source from which on repeating it brings little (arXiv:2305.16264)."""


class Share(NamedTuple):
    """A source in the training stream, where it follows the one before: its tokens, and its weight."""

    name: str
    tokens: int
    weight: float


def shares_of(manifest: "Manifest") -> tuple[Share, ...]:
    """The sources of a data set, in the order of its shards; empty for one source."""
    return tuple(Share(part.name, part.train.tokens, part.weight) for part in manifest.parts)


class Mixture:
    """Where windows of `seq_len` + 1 tokens begin in a stream of several sources.

    Each source has an endless order of its own, in which every epoch visits all its windows once. Raises DataError for
    a source shorter than a window.
    """

    def __init__(self, shares: Sequence[Share], seq_len: int, seed: int) -> None:
        self.shares = shares
        self._seq_len, self._seed = seq_len, seed
        self.windows = [(share.tokens - 1) // seq_len for share in shares]
        for share, windows in zip(shares, self.windows, strict=True):
            if windows < 1:
                raise DataError(
                    f"source {share.name} has {share.tokens} training tokens, less than one sequence of train.seq_len "
                    f"= {seq_len} and the token after it; give more text, or lower train.seq_len"
                )
        self._quotas = _quotas([share.weight for share in shares])
        # Where each source begins: in a block in its own order, and in the stream.
        self._firsts = [sum(self._quotas[:number]) for number in range(len(shares))]
        self._offsets = [sum(share.tokens for share in shares[:number]) for number in range(len(shares))]

    def start(self, place: int) -> int:
        """The token of the stream at which the window at a place of the endless order begins."""
        source, own = self.source_at(place)
        epoch, within = divmod(own, self.windows[source])
        window = permuted(within, self.windows[source], self._seed + 1 + source, epoch)
        return self._offsets[source] + window * self._seq_len

    def source_at(self, place: int) -> tuple[int, int]:
        """The source of a place by number, and how many windows of it come before, in the order of blocks."""
        block, within = divmod(place, BLOCK)
        slot = permuted(within, BLOCK, self._seed, block)
        source = max(number for number, first in enumerate(self._firsts) if first <= slot)
        return source, block * self._quotas[source] + slot - self._firsts[source]

    def epochs(self, places: int) -> dict[str, float]:
        """How often each source was read after so many windows in all, on average over blocks."""
        return {
            share.name: places * quota / BLOCK / windows
            for share, quota, windows in zip(self.shares, self._quotas, self.windows, strict=True)
        }


def too_often(epochs: dict[str, float]) -> str | None:
    """A line about sources that are read more often than it helps."""
    many = ", ".join(f"{name} {count:.1f} times" for name, count in epochs.items() if count > TOO_OFTEN)
    return f"more than {TOO_OFTEN:g} epochs of a source help little: {many}; lower its weight" if many else None


def _quotas(weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to BLOCK, at least 1 each and otherwise in proportion (largest remainders)."""
    spare = BLOCK - len(weights)
    exact = [spare * weight / sum(weights) for weight in weights]
    quotas = [1 + int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda number: (int(exact[number]) - exact[number], number))
    for number in by_remainder[: BLOCK - sum(quotas)]:
        quotas[number] += 1
    return quotas
