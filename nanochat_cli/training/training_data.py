"""What training asks of its data."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class TrainingData(Protocol):
    """Batches of inputs and targets, int64 [B, T]; a target of -100 does not count."""

    token_bytes: Tensor
    document_end: int | None
    """The token after every conversation, across which attention does not look; None for text, which is one stream."""

    def batch(self, step: int) -> Batch:
        """The global batch of a step; on one of several ranks the rows that it computes."""
        ...

    def shift(self, windows: int) -> None:
        """Before the first batch: move the order by so many windows, since the run has read batches of another size."""
        ...

    def is_ready(self, step: int) -> bool:
        """Whether the batch of a step has been read ahead."""
        ...

    def close(self) -> None:
        """Stop reading ahead; the next batch starts it again."""
        ...

    def scores(self, step: int) -> Tensor | None:
        """float32 [B, T], a score for each target of a step, from a file; None without one."""
        ...

    def held_out_batches(self, max_tokens: int | None) -> int:
        """How many `held_out` yields."""
        ...

    def held_out(self, max_tokens: int | None) -> Iterator[Batch]:
        """The held-out stream, or evenly spread windows of it."""
        ...

    def held_out_text(self, max_tokens: int | None) -> Iterator[Batch]:
        """The held-out side of data.base, the text that fine-tuning shall not forget."""
        ...

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """The training split in order; each piece begins with the last token of the one before."""
        ...
