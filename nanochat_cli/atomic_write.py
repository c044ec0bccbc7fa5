"""Writing that survives a power cut: data is synced before it is renamed into place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which is synced and renamed to `path` if all goes well.

    Each process has its own, so that of several writers the last one wins and nobody reads half a file. Anything but a
    regular file (/dev/stdout) is written directly. Raises OSError.
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
        with suppress(OSError):  # what prevented the writing may prevent this too; report the first error
            temporary.unlink()
        raise
    sync(path.parent)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file that is never seen half-written. Raises OSError."""
    with whole(path) as temporary:
        temporary.write_bytes(content)
