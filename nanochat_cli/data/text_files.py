"""A text file as documents in bounded pieces: UTF-8 as it is, UTF-16 and UTF-32 if a byte order mark says so."""

import codecs
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from nanochat_cli.data.documents import Document, LongLines, Place, Skipped

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


def text_documents(path: Path, name: str, piece: int) -> Iterator[Document | Skipped | LongLines]:
    """The file, in pieces of at least `piece` bytes if it is longer; left out entirely if any of it is unusable."""
    with path.open("rb") as file:
        head = file.read(4)
        encoding = next((encoding for mark, encoding in BYTE_ORDER_MARKS if head.startswith(mark)), None)
        file.seek(0)
        if encoding is not None:
            yield from _decoded(path, name, piece, encoding)
            return
        examined = Examined(iter(lambda: file.read(MAX_DOCUMENT), b""))
        if examined.reason is not None:
            yield Skipped(name, examined.reason)
            return
        if examined.longest_line > LONG_LINE:
            yield LongLines(name)
        file.seek(0)
        start = 0
        while content := _piece(file, piece):
            place = Place(path, start, len(content), is_record=False, start=0, length=len(content))
            yield Document(f"{name}@{start}" if start else name, content, place)
            start += len(content)


def _piece(file: BinaryIO, piece: int) -> bytes:
    """The next `piece` bytes and the rest of their last line or, if that is too long, of their last character."""
    content = file.read(piece)
    if len(content) < piece:
        return content
    content += file.readline(MAX_DOCUMENT)
    if not content.endswith(b"\n"):
        while (after := file.read(1)) and after[0] & 0xC0 == 0x80:
            content += after
        file.seek(-len(after), 1)
    return content


def _decoded(path: Path, name: str, piece: int, encoding: str) -> Iterator[Document | Skipped | LongLines]:
    def pieces() -> Iterator[bytes]:
        with path.open(encoding=encoding, newline="") as text:
            while content := text.read(piece):
                content += text.readline(MAX_DOCUMENT) if len(content) == piece else ""
                yield content.encode()

    examined = Examined(pieces())
    if examined.reason is not None:
        reason = (
            f"not {encoding.upper()}, as its byte order mark says" if examined.reason == NOT_UTF8 else examined.reason
        )
        yield Skipped(name, reason)
        return
    if examined.longest_line > LONG_LINE:
        yield LongLines(name)
    start = 0
    for content in pieces():
        yield Document(f"{name}@{start}" if start else name, content)
        start += len(content)


class Examined:
    """Checks a document, given in blocks: `reason` why it is unusable, or None; `longest_line` in bytes."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self.longest_line = 0
        self.reason = self._examine(blocks)

    def _examine(self, blocks: Iterable[bytes]) -> str | None:
        decoder = codecs.getincrementaldecoder("utf-8")()
        line, empty = 0, True
        try:
            for block in blocks:
                empty = False
                if b"\0" in block:
                    return _binary(block)
                decoder.decode(block)
                first, *others = block.split(b"\n")
                line += len(first)
                self.longest_line = max(self.longest_line, line, *map(len, others))
                line = len(others[-1]) if others else line
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            return NOT_UTF8
        return "empty" if empty else None


def _binary(block: bytes) -> str:
    """The kind of a block with NUL bytes: UTF-16 if its beginning decodes to text, much of it Latin."""
    head = block[:4096]
    for encoding, high in (("utf-16-le", 1), ("utf-16-be", 0)):
        text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)
        is_text = all(char.isprintable() or char.isspace() for char in text) and "\ufffd" not in text
        if len(text) >= 4 and is_text and head[high::2].count(0) > len(text) // 4:
            return "UTF-16 without a byte order mark"
    return "binary (NUL bytes)"
