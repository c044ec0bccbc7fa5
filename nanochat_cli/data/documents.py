"""The items of a corpus: documents, what was left out and why; and the spelling of names that are not UTF-8."""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_ESCAPED = re.compile(r"\\udc([89a-f][0-9a-f])")


class Place(NamedTuple):
    """The place of a document, to read it again: `size` bytes from `offset` of `file`.

    If that is a record (a line of .jsonl), the document is `length` bytes of its text from `start` on.
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
    """None if the text cannot be read at random: compressed or decoded files, JSON arrays, parquet and `hf:`."""
    tokens: NDArray[np.uint32] | None = None
    """The ids of a document that others tokenised, without an end-of-text id; `content` is what they decode to."""
    part: int = 0
    """The number of its source in a mixture."""


class Skipped(NamedTuple):
    id: str
    reason: str
    detail: str = ""
    """What to do about it, or what was there instead."""


class LongLines(NamedTuple):
    """A file that is used although it looks minified or generated."""

    id: str


def printable(text: str) -> str:
    r"""`text` as valid UTF-8: a byte of a name that is not UTF-8 is written as `\udcXX`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_named(text: str) -> str:
    """The inverse of `printable`."""
    return _ESCAPED.sub(lambda match: chr(0xDC00 + int(match[1], 16)), text)
