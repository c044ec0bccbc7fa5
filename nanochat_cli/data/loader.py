"""The training batches of a prepared data set, by `[loader]`: read in this process, or ahead by others."""

from nanochat_cli.config.schema import Config
from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.chat import chat_tokens
from nanochat_cli.data.loader_sources import BatchSource, ChatSource, FimSource, ShardSource, SourceSpec, TextSource
from nanochat_cli.data.shards import TOKENIZER, ShardReader
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import QuietReporter, Reporter


def source_spec(
    reader: ShardReader,
    config: Config,
    reporter: Reporter,
    shift: int = 0,
    rows: range | None = None,
    turns: int = 1,
) -> SourceSpec:
    """The source that `config` trains on; indexes the text first if it is to be tokenised on the fly. Raises DataError.

    shift: see `data.batches`. rows: of each batch, for a process that reads a part of it; None: all. turns: batches
    that follow each other in place of the one of a step.
    """
    stride = config.train.batch_size * config.train.grad_accum // turns
    rows = range(stride) if rows is None else rows
    if reader.manifest.chat is not None:
        return ChatSource(
            folder=reader.folder.absolute(),
            stop=chat_tokens(reader.tokenizer).stop,
            batch_size=len(rows),
            seq_len=config.train.seq_len,
            seed=config.run.seed,
            shift=shift + rows.start,
            stride=stride,
            base=None if config.data.base is None else config.data.base.absolute(),
            mix=config.train.mix,
        )
    source = _plain_spec(reader, config, reporter, shift + rows.start, len(rows), stride)
    if not config.fim.rate:
        return source
    return FimSource(source, reader.folder.absolute() / TOKENIZER, config.fim, config.run.seed)


def _plain_spec(
    reader: ShardReader, config: Config, reporter: Reporter, shift: int, batch_size: int, stride: int
) -> ShardSource | TextSource:
    seq_len = config.train.seq_len
    if not config.loader.on_the_fly:
        return ShardSource(reader.folder.absolute(), batch_size, seq_len, config.run.seed, shift, stride)
    manifest = reader.manifest
    if manifest.parts:
        raise DataError(f"{reader.folder}: is a mixture, which loader.on_the_fly does not read; turn it off")
    from nanochat_cli.data.text_index import text_index

    index, corpus = text_index(reader, config.data, reporter)
    return TextSource(
        folder=reader.folder.absolute(),
        index=index.absolute(),
        files=tuple(file.absolute() for file in corpus.files),
        text_field=str(manifest.settings["data.text_field"]),
        bytes_per_token=manifest.train.bytes / manifest.train.tokens,
        batch_size=batch_size,
        seq_len=seq_len,
        seed=config.run.seed,
        shift=shift,
        stride=stride,
    )


def open_batches(
    reader: ShardReader,
    config: Config,
    reporter: Reporter | None = None,
    shift: int = 0,
    rows: range | None = None,
    turns: int = 1,
) -> BatchSource:
    """The training batches. Raises DataError if there is not even one, before any process is started."""
    spec = source_spec(reader, config, reporter or QuietReporter(), shift, rows, turns)
    batches = spec.open()
    if not config.loader.enabled:
        return batches
    return AsyncLoader(spec, config.loader.workers, config.loader.prefetch)
