"""Files of records: JSON lines, plain or gzipped, and Parquet; each record with its place, for messages.

Knows nothing of what the records mean.
"""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from nanochat_cli.errors import DataError, reason
from nanochat_cli.nesting import parse_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


def records(path: Path) -> Iterator[tuple[str, object]]:
    """(where, record) of a .jsonl, .jsonl.gz or .parquet file; `where` is FILE:LINE. Empty lines are skipped.

    Raises DataError for a file that cannot be read and for a line that is not JSON.
    """
    try:
        if path.suffix == ".parquet":
            import pyarrow as pa
            from pyarrow import parquet

            try:
                rows = parquet.read_table(path).to_pylist()
            except pa.ArrowException as error:
                raise DataError(f"{path}: not a Parquet file: {' '.join(str(error).split())}") from error
            for number, row in enumerate(rows, 1):
                yield f"{path}: row {number}", row
            return
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _parsed(line, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot read: {reason(error)}") from error


def _parsed(line: bytes, where: str) -> object:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
