"""Files in tar archives, compressed or not, read one after the other without unpacking the archive."""

import io
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from nanochat_cli.data.documents import Document, LongLines, Skipped
from nanochat_cli.data.filters import Filters
from nanochat_cli.data.records import RECORDS, compression_of, opened
from nanochat_cli.data.source_files import TOOL_FOLDERS, matches
from nanochat_cli.data.text_files import MAX_DOCUMENT, text_documents
from nanochat_cli.errors import DataError

SUFFIXES = {".tar": "", ".tgz": ".gz", ".tbz2": ".bz2", ".txz": ".xz", ".crate": ".gz"}
"""Suffixes of archives, before that of a compression, and the compression that they imply."""


def archive_compression(path: Path) -> str | None:
    """The suffix of an archive's compression, "" without one; None if the name is not that of an archive."""
    name = path.name.lower()
    compression = compression_of(name)
    implied = SUFFIXES.get(PurePosixPath(name.removesuffix(compression)).suffix)
    return None if implied is None else implied or compression


def archive_documents(
    path: Path, name: str, compression: str, glob: str, filters: Filters
) -> Iterator[Document | Skipped | LongLines]:
    """The documents of an archive's files that match `glob`, in its order.

    Hidden files, links and records are left out. A damaged archive is read up to the damage.
    """
    try:
        with opened(path, compression) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                parts = PurePosixPath(member.name).parts
                hidden = any(part.startswith(".") or part in TOOL_FOLDERS for part in parts)
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or hidden or not matches(parts, glob):
                    continue
                inside = f"{name}/{'/'.join(parts)}"
                if inside.lower().endswith(RECORDS):
                    yield Skipped(inside, "records in an archive", "unpack it")
                    continue
                with tempfile.SpooledTemporaryFile(MAX_DOCUMENT) as spooled:
                    while block := content.read(MAX_DOCUMENT):
                        spooled.write(block)
                    yield from text_documents(partial(_again, spooled), inside, MAX_DOCUMENT, filters)
    except (tarfile.TarError, DataError) as error:
        yield Skipped(name, "damaged archive", " ".join(str(error).split()))


@contextmanager
def _again(file: tempfile.SpooledTemporaryFile[bytes]) -> Iterator[IO[bytes]]:
    file.seek(0)
    reader = io.BufferedReader(file)  # pyright: ignore[reportArgumentType] - it has readinto
    try:
        yield reader
    finally:
        reader.detach()
