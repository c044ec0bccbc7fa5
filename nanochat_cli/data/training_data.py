"""What the trainer reads: shards as torch tensors, training batches by step and the held-out stream.

Everything here is deterministic; the loader that reads ahead in worker processes is another class with the same
interface.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import Batches, evaluation_batches
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError

TOKENIZER_FILE = "tokenizer.json"


class ShardData:
    """The data set in a folder of shards, read synchronously."""

    def __init__(self, folder: Path, config: Config) -> None:
        """Raises DataError for a damaged or too small data set, ConfigError when its vocabulary is not the model's."""
        self.reader = ShardReader(folder)
        self.tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"{folder} has a vocabulary of {self.tokenizer.vocab_size}, model.vocab_size = "
                f"{config.model.vocab_size}; set model.vocab_size = {self.tokenizer.vocab_size} or tokenize again"
            )
        self.token_bytes = torch.from_numpy(self.tokenizer.byte_lengths())
        self._train = Batches(
            self.reader.tokens("train"),
            config.train.batch_size * config.train.grad_accum,
            config.train.seq_len,
            config.run.seed,
        )
        self._val = self.reader.tokens("val")
        self._eval_batch, self._seq_len = config.eval.batch_size, config.train.seq_len

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The global batch of a step: inputs and targets, int64 [batch_size × grad_accum, seq_len]."""
        inputs, targets = self._train.batch(step)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def held_out(self, max_tokens: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out stream in order, int64 [eval.batch_size, seq_len] at a time; padding has target -100."""
        for inputs, targets in evaluation_batches(self._val, self._eval_batch, self._seq_len, max_tokens):
            yield torch.from_numpy(inputs), torch.from_numpy(targets)
