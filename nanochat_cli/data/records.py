"""Records: files of many documents, recognised by suffix: JSON as lines or an array, also compressed, and parquet.

An unusable record is left out with its reason, and the rest is read. A damaged file is an error.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from nanochat_cli.data.documents import Document, Place, Skipped
from nanochat_cli.data.filters import Filters
from nanochat_cli.data.text_files import MAX_DOCUMENT, Examined
from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json

LINES = (".jsonl", ".ndjson")
JSON, PARQUET = ".json", ".parquet"
PARQUET_ROWS = 256
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ZSTANDARD = ".zst"
RECORDS = (*LINES, PARQUET)
HEAD = 64 * 1024
READ_AT_A_TIME = 1 << 20
_ARRAY_OF_OBJECTS = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")


class Kind(NamedTuple):
    """A format of records: .jsonl, .json or .parquet, and the suffix of its compression or ""."""

    form: str
    compression: str


class BadRecord(Exception):
    """A record without usable text: why, and what was there."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def kind_of(path: Path) -> Kind | None:
    """The format by the file's name, in any case; None for a file that is one document.

    A .json file holds records if it is an array of objects, or has an object on each of several lines.
    Raises OSError, and DataError if it is damaged.
    """
    name = path.name.lower()
    compression = compression_of(name)
    name = name.removesuffix(compression)
    if name.endswith(LINES):
        return Kind(LINES[0], compression)
    if name.endswith(PARQUET) and not compression:
        return Kind(PARQUET, "")
    if not name.endswith(JSON):
        return None
    with opened(path, compression) as file:
        head = file.read(HEAD)
    if _ARRAY_OF_OBJECTS.match(head):
        return Kind(JSON, compression)
    first, _, rest = head.partition(b"\n")
    if compression or (first.startswith(b"{") and rest.strip() and _is_object(first)):
        return Kind(LINES[0], compression)
    return None


def compression_of(name: str) -> str:
    """The suffix of a compression at the end of a name in lower case, or ""."""
    return next((suffix for suffix in (*COMPRESSIONS, ZSTANDARD) if name.endswith(suffix)), "")


def record_documents(
    path: Path, name: str, kind: Kind, text_field: str, filters: Filters = Filters()
) -> Iterator[Document | Skipped]:
    """One document per record, long ones in pieces."""
    if kind.form == PARQUET:
        yield from in_pieces(_parquet(path, name, text_field), filters)
    elif kind.form == JSON:
        yield from in_pieces(_array(path, name, kind.compression, text_field), filters)
    else:
        yield from in_pieces(_lines(path, name, kind.compression, text_field), filters)


def in_pieces(rows: Iterable[Document | Skipped], filters: Filters = Filters()) -> Iterator[Document | Skipped]:
    """The rows, long documents in pieces and unusable ones as Skipped."""
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        name, content, place = row[:3]
        reason = Examined([content] if content else [], filters).reason
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


def text_of(record: object, text_field: str) -> bytes:
    """The text of a record as UTF-8; a null counts as an empty document. Raises BadRecord.

    text_field: a key, or keys joined by dots if no key is spelled like that.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"a JSON {type(record).__name__}, expected an object with {text_field!r}")
    value: object = record
    for key in [text_field] if text_field in record else text_field.split("."):
        if not isinstance(value, dict) or key not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise BadRecord(f"no field {text_field!r}", f"it has: {there or 'none'}; set data.text_field")
        value = value[key]
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadRecord(f"field {text_field!r} is {type(value).__name__}, expected text", "set data.text_field")
    # A lone surrogate (legal in JSON) has no UTF-8; what surrogatepass writes is counted as "not UTF-8" and skipped.
    return value.encode("utf-8", "surrogatepass")


def parsed(line: bytes | str) -> object:
    """Parse JSON. Raises BadRecord."""
    try:
        return parse_json(line, max_depth=1000)  # deep fields do no harm: nobody reads them
    except ValueError as error:  # JSONDecodeError, or UnicodeDecodeError of the line
        raise BadRecord("not JSON", f"{error}") from error


@contextmanager
def opened(path: Path, compression: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. Raises OSError, and DataError if it is damaged."""
    try:
        if compression == ZSTANDARD:
            file = _zstandard(path)
        else:
            file = COMPRESSIONS[compression](path) if compression else path.open("rb")
        with file:
            yield file
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut short: {error}") from error


def _zstandard(path: Path) -> IO[bytes]:
    import pyarrow as pa

    if not pa.Codec.is_available("zstd"):
        raise DataError(f"{path}: this pyarrow was built without Zstandard; decompress the file first (zstd -d)")
    return io.BufferedReader(pa.input_stream(path, compression="zstd"))  # pyright: ignore[reportArgumentType] - readinto


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parsed(line), dict)
    except BadRecord:
        return False


def _lines(path: Path, name: str, compression: str, text_field: str) -> Iterator[Document | Skipped]:
    with opened(path, compression) as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            start, offset = offset, offset + len(line)
            if line.isspace():
                continue
            try:
                content = text_of(parsed(line), text_field)
            except BadRecord as bad:
                yield Skipped(f"{name}:{number}", bad.reason, bad.detail)
                continue
            place = None if compression else Place(path, start, len(line), is_record=True, start=0, length=len(content))
            yield Document(f"{name}:{number}", content, place)


def _array(path: Path, name: str, compression: str, text_field: str) -> Iterator[Document | Skipped]:
    number = 0
    try:
        with opened(path, compression) as file:
            for number, record in enumerate(elements(io.TextIOWrapper(file, encoding="utf-8-sig"))):
                try:
                    yield Document(f"{name}:{number}", text_of(record, text_field))
                except BadRecord as bad:
                    yield Skipped(f"{name}:{number}", bad.reason, bad.detail)
    except (ValueError, RecursionError) as error:
        yield Skipped(name, "not JSON from some record on", f"after {number}: {' '.join(str(error).split())}")


def elements(text: IO[str]) -> Iterator[object]:
    """The elements of a JSON array, a few at a time in memory. Raises ValueError, RecursionError."""
    decoder = json.JSONDecoder()
    buffer = text.read(READ_AT_A_TIME).lstrip()[1:]  # without the bracket
    place = 0
    while True:
        while place < len(buffer) and buffer[place] in " \t\r\n,":
            place += 1
        if buffer[place : place + 1] == "]":
            return
        try:
            element, place = decoder.raw_decode(buffer, place)
        except ValueError:
            more = text.read(max(READ_AT_A_TIME, len(buffer)))  # doubling keeps the total time linear
            if not more:
                raise
            buffer, place = buffer[place:] + more, 0
            continue
        yield element


def _parquet(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            column = text_field if text_field in columns else text_field.partition(".")[0]
            if column not in columns:
                yield Skipped(name, f"no field {text_field!r}", _columns(columns))
                return
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0):
                    try:
                        yield Document(f"{name}:{row}", text_of({column: value.as_py()}, text_field))
                    except BadRecord as bad:
                        yield Skipped(f"{name}:{row}", bad.reason, bad.detail)
                    row += 1
    except ArrowException as error:
        raise DataError(f"{path}: not a readable parquet file: {' '.join(str(error).split())}") from error


def _columns(names: Iterable[str]) -> str:
    return f"it has: {', '.join(names) or 'none'}; set data.text_field"
