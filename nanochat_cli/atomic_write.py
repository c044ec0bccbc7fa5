"""Writing that survives a power cut: what was synced before a rename is whole after it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to; the file there is synced and renamed to `path` when all went well.

    The place is this process's own, so that of several that write `path` the last one wins and none sees half of it.
    What is there and is no file (/dev/stdout) is written to as it is. Raises OSError.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        sync(temporary)
        temporary.rename(path)
    except BaseException:  # Ctrl-C included: nothing half-written stays behind
        with suppress(OSError):  # what prevented the writing may prevent this too; the first error is the one to tell
            temporary.unlink()
        raise
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that it is either whole or absent. Raises OSError."""
    with whole(path) as temporary:
        temporary.write_bytes(content)
