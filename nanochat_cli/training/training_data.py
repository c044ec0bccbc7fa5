"""What the trainer asks of its data."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Batch = tuple[Tensor, Tensor]


class TrainingData(Protocol):
    """What the trainer asks of the data: int64 [B, T] inputs and targets (-100: does not count)."""

    token_bytes: Tensor

    def batch(self, step: int) -> Batch:
        """The global batch of a step."""
        ...

    def shift(self, windows: int) -> None:
        """Before the first batch: the order is moved by so many windows, of a run that read batches of another size."""
        ...

    def is_ready(self, step: int) -> bool:
        """Whether the batch of a step has been read ahead."""
        ...

    def close(self) -> None:
        """End whatever reads ahead; a batch asked for afterwards begins anew."""
        ...

    def scores(self, step: int) -> Tensor | None:
        """float32 [B, T], scores of the tokens to be predicted, from collider.scores; None without such a file."""
        ...

    def held_out_batches(self, max_tokens: int | None) -> int:
        """How many `held_out` yields."""
        ...

    def held_out(self, max_tokens: int | None) -> Iterator[Batch]:
        """The held-out stream, or windows of it that are spread evenly."""
        ...

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """The training split in order; each piece begins with the last token of the one before."""
        ...
