"""A prepared data set as the trainer sees it: torch batches by step, and the held-out stream.

The order of batches is `data.batches`'; here arrays become tensors, and the micro-batches of a step
become one global batch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import Batches, evaluation_batches
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.training.bigram_init import BigramCounts, count_bigrams

COUNTED_AT_A_TIME = 4_000_000


class ShardData:
    """Training and held-out batches of `reader`, shaped by `config`. token_bytes: int64 [V]."""

    def __init__(self, reader: ShardReader, config: Config) -> None:
        train = config.train
        self.token_bytes: Tensor = torch.from_numpy(reader.tokenizer.byte_lengths())
        self._train = reader.tokens("train")
        self._vocab_size = config.model.vocab_size
        self._batches = Batches(self._train, train.batch_size * train.grad_accum, train.seq_len, config.run.seed)
        self._held_out = reader.tokens("val")
        self._rows = config.eval.batch_size
        self._seq_len = train.seq_len

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, int64 [batch_size × grad_accum, T]."""
        inputs, targets = self._batches.batch(step)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def bigrams(self) -> BigramCounts:
        """Pair counts of the whole training split, read a piece at a time."""
        starts = range(0, len(self._train) - 1, COUNTED_AT_A_TIME)
        return count_bigrams((self._train[s : s + COUNTED_AT_A_TIME + 1] for s in starts), self._vocab_size)

    def held_out(self, max_tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out tokens in order, int64 [eval.batch_size, T]; targets that do not count are -100."""
        for inputs, targets in evaluation_batches(self._held_out, self._rows, self._seq_len, max_tokens):
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
