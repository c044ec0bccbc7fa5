"""Sources of batches, as values that can be sent to another process and opened there.

Opening imports numpy and the tokenizer, but not torch: a process that only reads must start fast and stay small.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nanochat_cli.config.sections.fim import FimConfig
from nanochat_cli.data.batches import Batches, BatchSource


class SourceSpec(Protocol):
    """Picklable; every process that opens it gets the same batches of [batch_size, seq_len]."""

    @property
    def batch_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    def open(self) -> BatchSource: ...


@dataclass(frozen=True)
class ShardSource:
    """The training tokens of the data set in `folder`. shift, stride: see `data.batches`."""

    folder: Path
    batch_size: int
    seq_len: int
    seed: int
    shift: int = 0
    stride: int | None = None

    def open(self) -> Batches:
        from nanochat_cli.data.manifest import read_manifest
        from nanochat_cli.data.mixture import shares_of
        from nanochat_cli.data.shards import TokenStream, training_shards

        # Only evaluation needs the end-of-text token.
        stream = TokenStream(training_shards(self.folder), eos_id=0)
        shares = shares_of(read_manifest(self.folder))
        return Batches(stream, self.batch_size, self.seq_len, self.seed, self.shift, shares, self.stride)


@dataclass(frozen=True)
class ChatSource:
    """The conversations of the data set in `folder`, packed (see `data.chat_batches`), among text of that in `base`."""

    folder: Path
    stop: int
    batch_size: int
    seq_len: int
    seed: int
    shift: int = 0
    stride: int | None = None
    base: Path | None = None
    mix: float = 0.0

    def open(self) -> BatchSource:
        from nanochat_cli.data.chat_batches import ChatBatches, PackedRows
        from nanochat_cli.data.shards import TokenStream, training_shards

        rows = PackedRows(training_shards(self.folder), self.stop, self.seq_len, self.seed)
        text = None if self.base is None else TokenStream(training_shards(self.base), eos_id=self.stop)
        return ChatBatches(rows, self.batch_size, self.seed, self.shift, self.stride, text, self.mix)


@dataclass(frozen=True)
class TextSource:
    """The training text of the data set in `folder`, tokenised on reading (see `data.on_the_fly`)."""

    folder: Path
    index: Path
    files: tuple[Path, ...]
    text_field: str
    bytes_per_token: float
    batch_size: int
    seq_len: int
    seed: int
    shift: int = 0
    stride: int | None = None

    def open(self) -> BatchSource:
        from nanochat_cli.data.on_the_fly import TextBatches, TextStore
        from nanochat_cli.data.shards import TOKENIZER
        from nanochat_cli.data.tokenizer import Tokenizer

        store = TextStore(self.index, self.files, self.text_field)
        tokenizer = Tokenizer.load(self.folder / TOKENIZER)
        order = (self.batch_size, self.seq_len, self.seed, self.bytes_per_token, self.shift, self.stride)
        return TextBatches(store, tokenizer, *order)


@dataclass(frozen=True)
class FimSource:
    """The rows of `source`, with fill-in-the-middle (see `data.fim`). tokenizer: the file of theirs."""

    source: ShardSource | TextSource
    tokenizer: Path
    fim: FimConfig
    seed: int

    @property
    def batch_size(self) -> int:
        return self.source.batch_size

    @property
    def seq_len(self) -> int:
        return self.source.seq_len

    def open(self) -> BatchSource:
        from nanochat_cli.data.fim import FimBatches
        from nanochat_cli.data.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(self.tokenizer)
        stride = self.batch_size if self.source.stride is None else self.source.stride
        return FimBatches(self.source.open(), tokenizer, self.fim, self.seed, stride, self.source.shift)
