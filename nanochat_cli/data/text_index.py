"""The index of a data set's training text: where each document is in the source, so that it can be read at random.

Made once by a pass over the source, and kept beside the shards as `text-*.npy`: int64 [documents, 7], memory-mapped
by every process that reads it. It has no document that is held out or left out. Knows sources and splits; reads no text
afterwards.
"""

from array import array
from pathlib import Path

import numpy as np

from nanochat_cli.atomic_write import whole
from nanochat_cli.config.sections.data import DataConfig
from nanochat_cli.data.corpus import Corpus
from nanochat_cli.data.on_the_fly import COLUMNS
from nanochat_cli.data.prepare import source_of
from nanochat_cli.data.scan import bounded
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.split import document_keys, split_key
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import Reporter


def text_index(reader: ShardReader, data: DataConfig, reporter: Reporter) -> tuple[Path, Corpus]:
    """The index of a data set, made beside its shards if it is missing, and the corpus that it refers to.

    Raises DataError if the source has changed since, cannot be read at random, or the folder cannot be written.
    """
    corpus = source_of(reader.manifest, data)
    path = reader.folder / f"text-{reader.manifest.fingerprint[:12]}.npy"
    if not path.exists():
        rows = _read(corpus, reader, reporter)
        try:
            with whole(path) as temporary, temporary.open("wb") as out:
                np.save(out, rows)
        except OSError as error:
            raise DataError(f"{path}: cannot write the index of the text: {error.strerror}") from error
    return path, corpus


def _read(corpus: Corpus, reader: ShardReader, reporter: Reporter) -> np.ndarray:
    """int64 [training documents, COLUMNS]: a place, and the total length up to the document's end."""
    manifest = reader.manifest
    numbers = {file: number for number, file in enumerate(corpus.files)}
    training = document_keys(reader, "train")
    cells = array("q")
    limit = manifest.settings["data.max_bytes"]
    with reporter.progress("indexing the text", total=corpus.size_bytes, unit="B") as progress:
        for document in bounded(corpus, None if limit is None else int(limit)):
            progress.advance(len(document.content))
            if not training[key := split_key(document.content)]:
                continue
            training[key] -= 1
            if document.place is None:
                raise DataError(
                    f"{corpus.source}: cannot be read at random; give text files or .jsonl, without "
                    "data.secrets=mask and data.functions, or turn loader.on_the_fly off"
                )
            cells.extend((numbers[document.place.file], *document.place[1:]))
    rows = np.array(cells, dtype=np.int64).reshape(-1, COLUMNS - 1)
    if len(rows) != manifest.train.documents or rows[:, -1].sum() != manifest.train.bytes:
        raise DataError(
            f"{corpus.source}: has {len(rows)} training documents where the data set has {manifest.train.documents}; "
            "run `nanochat tokenize` again"
        )
    return np.column_stack((rows, np.cumsum(rows[:, -1])))
