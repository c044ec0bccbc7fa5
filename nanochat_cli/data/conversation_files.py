"""A source of conversations as a corpus: records of a file or of the hub, each one document.

Every record must be a conversation; the first that is none is an error with its place. Knows files and the hub;
`conversations` knows what a record means.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from nanochat_cli.data.conversations import conversation_of, to_bytes
from nanochat_cli.data.corpus import Corpus, identified, parse_hub_name
from nanochat_cli.data.documents import Document, printable
from nanochat_cli.data.filters import Filters
from nanochat_cli.data.hub import load_rows
from nanochat_cli.data.records import JSON, PARQUET, PARQUET_ROWS, BadRecord, Kind, elements, kind_of, opened, parsed
from nanochat_cli.errors import DataError


def open_conversations(source: str, streaming: bool = False, filters: Filters = Filters()) -> Corpus:
    """`source`: a .jsonl, .json or .parquet file, JSON also compressed, or `hf:NAME[@CONFIG][:SPLIT]`.

    Raises DataError for anything else; reading raises it for a record that is no conversation.
    """
    forms: Counter[str] = Counter()
    if source.startswith("hf:"):
        fingerprint = hashlib.sha256(json.dumps(["conversations", source]).encode()).hexdigest()
        return Corpus(
            source, fingerprint, None, lambda: _documents(_hub(source, streaming), forms), filters=filters, forms=forms
        )
    path = Path(source)
    if not path.is_file():
        raise DataError(f"{source}: conversations are read from a file of records (.jsonl, .json, .parquet) or hf:NAME")
    kind = kind_of(path)
    if kind is None:
        raise DataError(f"{source}: not a file of records; conversations are read from .jsonl, .json and .parquet")
    fingerprint, _ = identified(path.parent, [path], ["conversations"])
    return Corpus(
        source,
        fingerprint,
        None,
        lambda: _documents(_records(path, kind), forms),
        (path,),
        filters=filters,
        forms=forms,
    )


def _documents(records: Iterator[tuple[str, object]], forms: Counter[str]) -> Iterator[Document]:
    forms.clear()
    for place, record in records:
        try:
            conversation = conversation_of(record)
        except BadRecord as bad:
            raise DataError(printable(f"{place}: {bad}")) from bad
        forms[conversation.form] += 1
        yield Document(place, to_bytes(conversation.turns))


def _records(path: Path, kind: Kind) -> Iterator[tuple[str, object]]:
    """Every record with its place, such as chat.jsonl:12. Raises DataError if the file is damaged."""
    try:
        if kind.form == PARQUET:
            yield from _parquet(path)
            return
        with opened(path, kind.compression) as file:
            if kind.form == JSON:
                text = io.TextIOWrapper(file, encoding="utf-8-sig")
                yield from ((f"{path.name}, record {number}", one) for number, one in enumerate(elements(text), 1))
                return
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    place = f"{path.name}:{number}"
                    yield place, _parsed(line, place)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON from some record on: {' '.join(str(error).split())}") from error


def _parsed(line: bytes, place: str) -> object:
    try:
        return parsed(line)
    except BadRecord as bad:
        raise DataError(printable(f"{place}: {bad} ({bad.detail})")) from bad


def _parquet(path: Path) -> Iterator[tuple[str, object]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=PARQUET_ROWS) for row in batch.to_pylist())
            yield from ((f"{path.name}, row {number}", _present(row)) for number, row in enumerate(rows, 1))
    except ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error


def _hub(source: str, streaming: bool) -> Iterator[tuple[str, object]]:
    from datasets.exceptions import DatasetsError

    name, config, split = parse_hub_name(source)
    rows = load_rows(source, "give a file of its records", name, config, split=split, streaming=streaming)
    try:
        for number, row in enumerate(rows, 1):
            yield f"{split}, row {number}", _present(row)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{source}: cannot load: {' '.join(str(error).split())}") from error


def _present(row: dict[str, object]) -> dict[str, object]:
    """Without nulls: in a table every row has every column."""
    return {name: value for name, value in row.items() if value is not None}
