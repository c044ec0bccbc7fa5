"""What a corpus is made of: documents, what was left out and why, and how names are written that are no UTF-8."""

import re
from pathlib import Path
from typing import NamedTuple

_ESCAPED = re.compile(r"\\udc([89a-f][0-9a-f])")


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
    """None where text cannot be read at random: what is compressed or decoded, arrays, parquet and `hf:`."""


class Skipped(NamedTuple):
    id: str
    reason: str
    detail: str = ""
    """What to do about it, or what was found instead."""


class LongLines(NamedTuple):
    """A file that is taken although it looks minified or generated."""

    id: str


def printable(text: str) -> str:
    r"""`text` as UTF-8 can hold it: a byte of a name that is none is written as `\udcXX`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_named(text: str) -> str:
    """The name that `printable` wrote."""
    return _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
