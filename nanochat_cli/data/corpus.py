"""Corpora: a source named on the command line becomes a re-iterable stream of documents.

Knows where text comes from (files, folders, records, `datasets`) and which of it is usable: valid UTF-8
without NUL bytes. Memory is bounded by one document. Knows nothing of tokens, splits or shards.
"""

import codecs
import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from nanochat_cli.data.source_files import made_by, walk
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.nesting import parse_json

RECORD_SUFFIXES = (".jsonl", ".parquet")
# A longer document is cut at the first line end after this many bytes: encoding takes some 40 bytes of memory per byte.
MAX_DOCUMENT = 1024 * 1024
# A source that is one text file is cut finer, so that part of it can be held out.
SINGLE_FILE_PIECE = 16 * 1024
PARQUET_ROWS = 256


class Place(NamedTuple):
    """Where to read a document again: `size` bytes from `offset` of `file`.

    Of a record (a line of .jsonl) the document is `length` bytes of its text from `start` on; else it is those bytes.
    """

    file: Path
    offset: int
    size: int
    is_record: bool
    start: int
    length: int


class Document(NamedTuple):
    id: str
    content: bytes
    place: Place | None = None
    """None where text cannot be read at random: parquet and `hf:`."""


class Skipped(NamedTuple):
    id: str
    reason: str


@dataclass
class Corpus:
    """Documents in a fixed order, read afresh by every iteration.

    `skipped` counts by reason what the last iteration left out; `size_bytes` is the size of the files, when known;
    `files` are those that documents have their places in.
    """

    source: str
    fingerprint: str
    size_bytes: int | None
    read: Callable[[], Iterator[Document | Skipped]]
    files: tuple[Path, ...] = ()
    skipped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Document]:
        """Usable documents. Raises DataError when there is none, or when the source cannot be read."""
        self.skipped.clear()
        usable = 0
        for item in self.read():
            if isinstance(item, Skipped):
                self.skipped[item.reason] += 1
            else:
                usable += 1
                yield item
        if not usable:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
            raise DataError(f"{self.source}: no usable document" + (f" ({why})" if why else ": it is empty"))


def open_corpus(
    source: str,
    glob: str = "**/*",
    text_field: str = "text",
    streaming: bool = False,
    output: Path | None = None,
) -> Corpus:
    """The corpus that `source` names: `stdlib`, `hf:NAME[@CONFIG][:SPLIT]`, a folder, a file, .jsonl or .parquet.

    `glob` selects files of a folder: without a slash it is matched against the file name at any depth. When it ends in
    .jsonl or .parquet the files are read as records. Hidden files and folders, links to folders and what programs made
    (see `source_files`) are left out, and so is `output`, the folder that will be written.
    `text_field` is the column of records. `streaming` reads an `hf:` source without storing it first.
    Raises DataError when the source does not exist, no file matches, or it is a data set already; ConfigError when it
    is `output` itself.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = list(walk(root, "*.py", leave_out=("site-packages", "dist-packages")))
        # The interpreter's version and the sizes identify it; its mtimes say only when it was installed.
        return _file_corpus(source, root, files, text_field, [sys.version], mtimes=False)
    if source.startswith("hf:"):
        return _hub_corpus(source, text_field, streaming)
    path = Path(source)
    if path.is_dir():
        _require_corpus(path, output)
        files = list(walk(path, glob, output=output))
        if not files:
            raise DataError(f"{source}: no file matches glob '{glob}'; set data.glob (--glob)")
        return _file_corpus(source, path, files, text_field, [glob])
    if not path.exists():
        raise DataError(
            f"{source}: no such file or folder (a source is 'stdlib', a file, a folder, or hf:NAME[@CONFIG][:SPLIT])"
        )
    return _file_corpus(source, path.parent, [path], text_field, [], piece=SINGLE_FILE_PIECE, records=True)


def _require_corpus(folder: Path, output: Path | None) -> None:
    if output is not None and output.resolve() == folder.resolve():
        raise ConfigError(f"{folder}: is the source and the folder to be written; choose another --out")
    if made_by(folder, [path.name for path in folder.iterdir()], []) == "a data set":
        raise DataError(f"{folder}: is a data set of nanochat tokenize, not a corpus; train on it with data.path")


# -- files -----------------------------------------------------------------------------------------------


def _file_corpus(
    source: str,
    root: Path,
    files: list[Path],
    text_field: str,
    identity: list[str],
    *,
    mtimes: bool = True,
    piece: int = MAX_DOCUMENT,
    records: bool | None = None,
) -> Corpus:
    if records is None:
        records = bool(identity) and identity[-1].endswith(RECORD_SUFFIXES)
    digest = hashlib.sha256(json.dumps(identity).encode())
    total: int | None = 0
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}") from error
        total = None if total is None or path.suffix in RECORD_SUFFIXES else total + status.st_size
        name = os.fsencode(path.relative_to(root))
        digest.update(b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns if mtimes else 0))

    def read() -> Iterator[Document | Skipped]:
        for path in files:
            name = str(path.relative_to(root))
            try:
                if records and path.suffix == ".jsonl":
                    yield from _checked(_jsonl_documents(path, name, text_field))
                elif records and path.suffix == ".parquet":
                    yield from _checked(_parquet_documents(path, name, text_field))
                else:
                    yield from _text_documents(path, name, piece)
            except OSError as error:
                raise DataError(f"{path}: cannot read: {error.strerror or error}") from error

    return Corpus(source, digest.hexdigest(), total, read, tuple(files))


def _text_documents(path: Path, name: str, piece: int) -> Iterator[Document | Skipped]:
    """The file, in pieces of at least `piece` bytes when it is longer; left out whole if any of it is unusable."""
    with path.open("rb") as file:
        reason = _unusable(iter(lambda: file.read(MAX_DOCUMENT), b""))
        if reason is not None:
            yield Skipped(name, reason)
            return
        file.seek(0)
        start = 0
        while content := file.read(piece):
            content += file.readline() if len(content) == piece else b""
            place = Place(path, start, len(content), is_record=False, start=0, length=len(content))
            yield Document(f"{name}@{start}" if start else name, content, place)
            start += len(content)


def _unusable(blocks: Iterable[bytes]) -> str | None:
    """Why a document, given in blocks, is left out, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    empty = True
    try:
        for block in blocks:
            empty = False
            if b"\0" in block:
                return "binary (NUL bytes)"
            decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return "not UTF-8"
    return "empty" if empty else None


# -- records ---------------------------------------------------------------------------------------------


def _checked(rows: Iterable[Document]) -> Iterator[Document | Skipped]:
    """Rows that are usable, long ones in pieces."""
    for name, content, place in rows:
        reason = _unusable([content] if content else [])
        if reason is not None:
            yield Skipped(name, reason)
            continue
        start = 0
        while start < len(content):
            line_end = content.find(b"\n", start + MAX_DOCUMENT - 1)
            stop = len(content) if line_end < 0 else line_end + 1
            piece = None if place is None else place._replace(start=start, length=stop - start)
            yield Document(f"{name}@{start}" if start else name, content[start:stop], piece)
            start = stop


def _jsonl_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if line.isspace():
                continue
            content = jsonl_text(line, text_field, f"{path}:{number}")
            place = Place(path, start, len(line), is_record=True, start=0, length=len(content))
            yield Document(f"{name}:{number}", content, place)


def jsonl_text(line: bytes, text_field: str, where: str) -> bytes:
    """UTF-8 of the text of one line of .jsonl. Raises DataError, beginning with `where`."""
    try:
        record = parse_json(line, max_depth=1000)  # of fields that nobody reads
    except ValueError as error:  # JSONDecodeError, or UnicodeDecodeError of the line
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, expected an object with {text_field!r}")
    return _record_text(record, text_field, where)


def _parquet_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise _no_field(str(path), text_field, columns)
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_field]):
                for value in batch.column(0):
                    yield Document(
                        f"{name}:{row}", _record_text({text_field: value.as_py()}, text_field, f"{path}: row {row}")
                    )
                    row += 1
    except ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error


def _record_text(record: dict, text_field: str, where: str) -> bytes:
    """UTF-8 of the text column; a null counts as an empty document."""
    if text_field not in record:
        raise _no_field(where, text_field, list(record))
    value = record[text_field]
    if value is None:
        return b""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {text_field!r} is {type(value).__name__}, expected text; set data.text_field")
    # A lone surrogate (legal in JSON) has no UTF-8; what surrogatepass writes is counted as "not UTF-8" and skipped.
    return value.encode("utf-8", "surrogatepass")


def _no_field(where: str, text_field: str, columns: list[str]) -> DataError:
    return DataError(
        f"{where}: no field {text_field!r}; columns there: {', '.join(columns) or 'none'}; set data.text_field"
    )


# -- hf: -------------------------------------------------------------------------------------------------


def _hub_corpus(source: str, text_field: str, streaming: bool) -> Corpus:
    """A data set through `datasets.load_dataset`. `NAME` may be a local folder of data files.

    The fingerprint of a hub data set is its name: a changed revision is not noticed. A local folder's is its files'.
    """
    name, config, split = _parse_hub_name(source)
    identity = ["hf", name, config or "", split, text_field]
    if Path(name).is_dir():
        identity.append(_file_corpus(source, Path(name), list(walk(Path(name), "*")), text_field, []).fingerprint)

    def read() -> Iterator[Document | Skipped]:
        import datasets
        from datasets.exceptions import DatasetsError

        try:
            rows = datasets.load_dataset(name, config, split=split, streaming=streaming)
            yield from _checked(
                Document(f"{split}:{number}", _record_text(record, text_field, f"{source}: row {number}"))
                for number, record in enumerate(rows)
            )
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{source}: cannot load: {' '.join(str(error).split())}") from error

    digest = hashlib.sha256(json.dumps(identity).encode())
    return Corpus(source, digest.hexdigest(), None, read)


def _parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """`hf:NAME[@CONFIG][:SPLIT]` -> (name, config or None, split; default train)."""
    rest = source.removeprefix("hf:")
    if rest and Path(rest).is_dir():
        return rest, None, "train"
    name, _, split = rest.partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise DataError(f"{source}: no data set named; write hf:NAME[@CONFIG][:SPLIT]")
    return name, config or None, split or "train"
