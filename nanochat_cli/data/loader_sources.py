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
        from nanochat_cli.data.shards import Shard, TokenStream

        # The reader has verified the files; only evaluation needs the end-of-text token.
        manifest = read_manifest(self.folder)
        stream = TokenStream([Shard(self.folder / info.file, info) for info in manifest.train.shards], eos_id=0)
        shares = shares_of(manifest)
        return Batches(stream, self.batch_size, self.seq_len, self.seed, self.shift, shares, self.stride)


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
