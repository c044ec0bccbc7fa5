"""A text file as documents in bounded pieces: UTF-8 as it is, UTF-16 and UTF-32 if a byte order mark says so."""

import codecs
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from nanochat_cli.data.documents import Document, LongLines, Place, Skipped
from nanochat_cli.data.filters import HEAD, Filters

# A longer document is cut at the first line end after this many bytes: encoding takes some 40 bytes of memory per byte.
# If no line ends within as many bytes again, it is cut between characters.
MAX_DOCUMENT = 1024 * 1024
# A line above this many bytes was written by a program: minified code, data, an image as text.
LONG_LINE = 10_000
NOT_UTF8 = "not UTF-8"
# UTF-32 first: its little-endian mark begins with UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
Opened = Callable[[], AbstractContextManager[Any]]
"""Opens a binary file, which can peek, at its beginning, as often as it is called."""


def text_documents(
    opened: Opened, name: str, piece: int, filters: Filters = Filters(), place: Path | None = None
) -> Iterator[Document | Skipped | LongLines]:
    """The text, in pieces of at least `piece` bytes if it is longer; left out entirely if any of it is unusable.

    place: the file, if its bytes are the text.
    """
    with opened() as file:
        head = file.read(4)
    encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), None)
    if encoding is None:
        pieces = partial(_pieces, opened, piece)
        examined = Examined(_blocks(opened), filters)
    else:
        pieces = partial(_decoded, opened, piece, encoding)
        examined = Examined(pieces(), filters)
    if (reason := examined.reason) is not None:
        if encoding is not None and reason == NOT_UTF8:
            reason = f"not {encoding.upper()}, as its byte order mark says"
        yield Skipped(name, reason)
        return
    if examined.longest_line > LONG_LINE:
        yield LongLines(name)
    start = 0
    for content in pieces():
        size = len(content)
        where = None if place is None or encoding else Place(place, start, size, is_record=False, start=0, length=size)
        yield Document(f"{name}@{start}" if start else name, content, where)
        start += size


def _blocks(opened: Opened) -> Iterator[bytes]:
    with opened() as file:
        yield from iter(lambda: file.read(MAX_DOCUMENT), b"")


def _pieces(opened: Opened, piece: int) -> Iterator[bytes]:
    """`piece` bytes and the rest of their last line or, if that is too long, of their last character."""
    with opened() as file:
        while content := file.read(piece):
            if len(content) == piece:
                content += file.readline(MAX_DOCUMENT)
                while not content.endswith(b"\n") and (after := file.peek(1)[:1]) and after[0] & 0xC0 == 0x80:
                    content += file.read(1)
            yield content


def _decoded(opened: Opened, piece: int, encoding: str) -> Iterator[bytes]:
    with opened() as file:
        text = io.TextIOWrapper(file, encoding, newline="")
        try:
            while content := text.read(piece):
                content += text.readline(MAX_DOCUMENT) if len(content) == piece else ""
                yield content.encode()
        finally:
            text.detach()  # whoever opened it closes it


class Examined:
    """Checks a document, given in blocks: `reason` to leave it out, or None; `longest_line` in bytes."""

    def __init__(self, blocks: Iterable[bytes], filters: Filters = Filters()) -> None:
        self.size = self.lines = self.longest_line = 0
        self.head = b""
        self.reason = self._examine(blocks) or filters.reason(self.size, self.lines, self.longest_line, self.head)

    def _examine(self, blocks: Iterable[bytes]) -> str | None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        line = 0
        try:
            for block in blocks:
                self.size += len(block)
                if len(self.head) < HEAD:
                    self.head = (self.head + block)[:HEAD]
                if b"\0" in block:
                    return _binary(block)
                decoder.decode(block)
                first, *others = block.split(b"\n")
                line += len(first)
                self.longest_line = max(self.longest_line, line, *map(len, others))
                self.lines += len(others)
                line = len(others[-1]) if others else line
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return NOT_UTF8
        self.lines += line > 0
        return None if self.size else "empty"


def _binary(block: bytes) -> str:
    """The kind of a block with NUL bytes: UTF-16 if its beginning decodes to text, much of it Latin."""
    head = block[:4096]
    for encoding, high in (("utf-16-le", 1), ("utf-16-be", 0)):
        text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)
        is_text = all(char.isprintable() or char.isspace() for char in text) and "\ufffd" not in text
        if len(text) >= 4 and is_text and head[high::2].count(0) > len(text) // 4:
            return "UTF-16 without a byte order mark"
    return "binary (NUL bytes)"
