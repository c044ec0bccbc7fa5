"""A prepared data set of conversations as the trainer sees it: packed rows of which only answers count.

The rows come from `data.chat_batches`. Beside them stands the text of data.base: mixed in, and held out to be measured.
"""

from collections.abc import Iterator

from nanochat_cli.config.schema import Config
from nanochat_cli.data.batches import evaluation_batches
from nanochat_cli.data.chat import chat_tokens
from nanochat_cli.data.chat_batches import PackedRows
from nanochat_cli.data.shards import ShardReader, TokenStream
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.report.reporter import QuietReporter, Reporter
from nanochat_cli.training.shard_data import ShardData, as_tensors
from nanochat_cli.training.training_data import Batch


def open_data(
    reader: ShardReader,
    config: Config,
    reporter: Reporter | None = None,
    rows: range | None = None,
    turns: int = 1,
) -> ShardData:
    """The data set as what it holds: text or conversations. Arguments as of `ShardData`."""
    if reader.manifest.chat is None:
        return ShardData(reader, config, reporter, rows, turns)
    return ChatData(reader, config, reporter, rows)


class ChatData(ShardData):
    """Raises ConfigError for a rank of several."""

    def __init__(
        self, reader: ShardReader, config: Config, reporter: Reporter | None = None, rows: range | None = None
    ) -> None:
        if rows is not None:
            raise ConfigError(f"{reader.folder} holds conversations, which one process trains on: leave out --nproc")
        super().__init__(reader, config, reporter)
        self.document_end = chat_tokens(reader.tokenizer).stop
        self._text: TokenStream | None = None  # opened by those who need it: not by an evaluation of answers
        self._training_rows, self._held_out_rows = (
            PackedRows(reader.shards(split), self.document_end, self._seq_len, config.run.seed)
            for split in ("train", "val")
        )

    def warn_of_epochs(self) -> None:
        """Say how the conversations are packed, how often they will be read, and what does not fit into a row."""
        train, rows, reporter = self._config.train, self._training_rows, self._reporter or QuietReporter()
        if self._config.data.base is not None:
            self._open_text()  # an error of it comes before the first step
        found, packing = rows.conversations, rows.packing
        per_epoch = len(rows) / ((1 - train.mix) * train.batch_size * train.grad_accum)
        epochs = "" if train.time_budget is not None else f"; {train.total_steps / per_epoch:.1f} epochs"
        reporter.info(
            f"{len(found):,} conversations in {len(rows):,} rows of {self._seq_len} tokens, "
            f"{packing.filled:.1%} filled; an epoch is {per_epoch:.1f} steps{epochs}"
        )
        if self._config.train.init is None:
            reporter.warn("train.init is not set: the model begins from random weights, and knows nothing but answers")
        if found.cut or found.left_out:
            reporter.warn(
                f"longer than train.seq_len = {self._seq_len}: {found.cut} conversations lose their end, and "
                f"{found.left_out} are left out, since their first answer comes later"
            )

    def held_out_batches(self, max_tokens: int | None) -> int:
        return -(-len(self._held_out_rows.evaluation_rows(max_tokens)) // self._rows)

    def held_out(self, max_tokens: int | None) -> Iterator[Batch]:
        """Held-out conversations, packed."""
        return as_tensors(self._held_out_rows.evaluation(self._rows, max_tokens))

    def held_out_text(self, max_tokens: int | None) -> Iterator[Batch]:
        return as_tensors(evaluation_batches(self._open_text(), self._rows, self._seq_len, max_tokens))

    def _open_text(self) -> TokenStream:
        """The held-out side of data.base. Raises DataError unless that holds text in the same tokens."""
        if self._text is not None:
            return self._text
        base = self._config.data.base
        assert base is not None, "there is a data.base"
        reader = ShardReader(base)
        if reader.manifest.chat is not None:
            raise DataError(f"data.base = {base}: holds conversations; it is for text")
        if reader.tokenizer.to_str() != self._reader.tokenizer.to_str():
            raise DataError(
                f"data.base = {base}: has another tokenizer than {self._reader.folder}; prepare that again with "
                f"--tokenizer {base}"
            )
        self._text = reader.tokens("val")
        return self._text
