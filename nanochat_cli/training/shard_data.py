"""A prepared data set as the trainer sees it: torch batches by step, and the held-out stream.

The order of batches comes from `data.batches`, and `data.loader` may read them ahead; here arrays become tensors, and
the micro-batches of a step become one global batch.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.batches import Batch as Arrays
from nanochat_cli.data.batches import Batches, evaluation_batches, evaluation_windows
from nanochat_cli.data.fim import sentinels
from nanochat_cli.data.loader import open_batches
from nanochat_cli.data.loader_sources import BatchSource
from nanochat_cli.data.mixture import Mixture, shares_of, too_often
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.score_file import ScoreBatches
from nanochat_cli.training.training_data import Batch

PIECE = 4_000_000


class ShardData:
    """Training and held-out batches of `reader`, shaped by `config`. token_bytes: int64 [V].

    rows: of the batch of a step, for a rank that computes these; None: all. turns: equal parts of a batch, one after
    the other, each of which has such rows.
    """

    def __init__(
        self,
        reader: ShardReader,
        config: Config,
        reporter: Reporter | None = None,
        rows: range | None = None,
        turns: int = 1,
    ) -> None:
        train = config.train
        self._reader, self._config, self._reporter, self._part, self._turns = reader, config, reporter, rows, turns
        self._batches: BatchSource | None = None  # opened by the first batch: evaluation needs none
        self._scores: ScoreBatches | None = None
        self._shift = 0
        self.token_bytes: Tensor = torch.from_numpy(reader.tokenizer.byte_lengths())
        self._train = reader.tokens("train")
        self.document_end: int | None = None
        if (
            not config.loader.on_the_fly and reader.manifest.chat is None
        ):  # a corpus that is too short is an error before a run begins
            size, shares = train.batch_size * train.grad_accum, shares_of(reader.manifest)
            Batches(self._train, size, train.seq_len, config.run.seed, shares=shares)
        if config.fim.rate:  # and so is a vocabulary without the tokens
            sentinels(reader.tokenizer)
        self._held_out = reader.tokens("val")
        self._rows = config.eval.batch_size
        self._seq_len = train.seq_len

    def warn_of_epochs(self) -> None:
        """Say before a run of known length which sources of a mixture it reads too often."""
        train, shares = self._config.train, shares_of(self._reader.manifest)
        if shares and train.time_budget is None and self._reporter is not None:
            places = train.total_steps * train.batch_size * train.grad_accum
            line = too_often(Mixture(shares, train.seq_len, self._config.run.seed).epochs(places))
            if line is not None:
                self._reporter.warn(line)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 [batch_size × grad_accum, T], or of its `rows`."""
        if self._batches is None:
            arguments = (self._reader, self._config, self._reporter, self._shift, self._part, self._turns)
            self._batches = open_batches(*arguments)
        of_turns = [self._batches.batch(step * self._turns + turn) for turn in range(self._turns)]
        inputs, targets = (torch.from_numpy(np.concatenate(part)) for part in zip(*of_turns, strict=True))
        return inputs, targets

    def shift(self, windows: int) -> None:
        """Before the first batch: move the order by so many windows (see `data.batches`)."""
        self._shift = windows

    def scores(self, step: int) -> Tensor | None:
        """float32 [rows, T] from collider.scores, beside the targets of a step; None without."""
        path = self._config.collider.scores
        if not self._config.collider.enabled or path is None:
            return None
        if self._scores is None:
            self._scores = ScoreBatches(path, self._reader, self._config, self._shift)
        scores, part = self._scores.batch(step), self._part
        return scores if part is None else scores.unflatten(0, (self._turns, -1))[:, part].flatten(0, 1)

    def is_ready(self, step: int) -> bool:
        """Whether the batch of a step has been read ahead."""
        batches, first = self._batches, step * self._turns
        return isinstance(batches, AsyncLoader) and all(batches.is_ready(first + turn) for turn in range(self._turns))

    def close(self) -> None:
        """End the processes that read ahead."""
        if isinstance(self._batches, AsyncLoader):
            self._batches.close()

    def pieces(self) -> Iterator[NDArray[np.int64]]:
        """The training split in pieces, each of which begins with the last token of the one before."""
        starts = range(0, len(self._train) - 1, PIECE)
        return (self._train[start : start + PIECE + 1] for start in starts)

    def held_out_batches(self, max_tokens: int | None) -> int:
        """How many `held_out` yields."""
        return -(-evaluation_windows(self._held_out, self._seq_len, max_tokens) // self._rows)

    def held_out(self, max_tokens: int | None) -> Iterator[Batch]:
        """The held-out tokens in order, int64 [eval.batch_size, T]; targets that do not count are -100."""
        return as_tensors(evaluation_batches(self._held_out, self._rows, self._seq_len, max_tokens))

    def held_out_text(self, max_tokens: int | None) -> Iterator[Batch]:
        return self.held_out(max_tokens)


def as_tensors(batches: Iterable[Arrays]) -> Iterator[Batch]:
    """The same memory as tensors."""
    return ((torch.from_numpy(inputs), torch.from_numpy(targets)) for inputs, targets in batches)
