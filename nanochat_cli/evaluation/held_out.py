"""The held-out documents of a data set, and their languages by file extension.

Shards hold no file names, so the source is read again and must be unchanged. Text without files (records, the hub,
tokens of others) has the language `other`.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.schema import Config
from nanochat_cli.data.manifest import Split
from nanochat_cli.data.origin import OTHER, language_of
from nanochat_cli.data.prepare import source_of
from nanochat_cli.data.scan import bounded
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.split import document_keys, split_key
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.run.dataset import open_run_data
from nanochat_cli.report.reporter import Reporter

if TYPE_CHECKING:
    from nanochat_cli.formats.open import LoadedRun

UNKNOWN = "unknown"


@dataclass(frozen=True)
class TokenArray:
    """Concatenated token ids of documents, each ended by EOS; read like a `TokenStream`. ids: int64 [n]."""

    ids: NDArray[np.int64]
    eos_id: int
    lengths: tuple[int, ...]
    """Tokens of each document, EOS included."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, where: slice, /) -> NDArray[np.int64]:
        return self.ids[where]


def open_held_out(
    target: Path,
    run: "LoadedRun | None",
    data: Path | None,
    reporter: Reporter,
    splits: Sequence[Split] = ("val",),
) -> ShardReader:
    """The data set in the folder `data`, or else the run's; splits: those that must be as they were in training.

    Raises DataError, and ConfigError when there is neither.
    """
    if data is not None:
        return ShardReader(data)
    if run is None:
        raise ConfigError(f"{target} does not say what was held out: give a data set with --data")
    instead = f", or measure on any data set, in the tokens of the run: nanochat eval {target} --data DIR"
    return open_run_data(target, run.config, reporter, splits, instead=instead)


def document_languages(reader: ShardReader, config: Config, reporter: Reporter) -> list[str]:
    """The language of every held-out document, in the order of the shards; `config.data` has the glob.

    Raises DataError when the source has changed since the data set was made.
    """
    manifest = reader.manifest
    if {"data.format", "data.chat"} & manifest.settings.keys():  # they name no documents
        return [OTHER] * manifest.val.documents
    corpus = source_of(manifest, config.data)
    limit = manifest.settings["data.max_bytes"]
    held_out, n_bytes = document_keys(reader, "val"), 0
    languages: list[str] = []
    with reporter.progress("languages of documents", total=corpus.size_bytes, unit="B") as progress:
        for document in bounded(corpus, None if limit is None else int(limit)):
            if held_out[key := split_key(document.content)]:
                held_out[key] -= 1
                languages.append(language_of(document.id))
                n_bytes += len(document.content)
            progress.advance(len(document.content))
    if len(languages) != manifest.val.documents or n_bytes != manifest.val.bytes:
        raise DataError(f"{corpus.source}: changed since the data set was made; run `nanochat tokenize` again")
    return languages


def known_languages(reader: ShardReader, config: Config, reporter: Reporter) -> list[str]:
    """`document_languages`, or UNKNOWN for every document, with a warning, where the source has changed."""
    try:
        return document_languages(reader, config, reporter)
    except DataError as error:
        reporter.warn(f"no figures by language: {error}")
        return [UNKNOWN] * reader.manifest.val.documents


def encode_held_out(reader: ShardReader, tokenizer: Tokenizer) -> TokenArray:
    """The held-out documents in the tokens of `tokenizer`; those of the shards when they have the same one."""
    if tokenizer.to_str() == reader.tokenizer.to_str():
        stream = reader.tokens("val")
        return TokenArray(stream[:], stream.eos_id, tuple(len(document) + 1 for document in stream.documents()))
    ids, lengths = array("q"), []
    for content in reader.documents("val"):
        document = tokenizer.encode_bytes(content)
        ids.extend(document)
        ids.append(tokenizer.eos_id)
        lengths.append(len(document) + 1)
    return TokenArray(np.frombuffer(ids, dtype=np.int64), tokenizer.eos_id, tuple(lengths))
