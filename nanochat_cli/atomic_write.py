"""Writing that survives a power cut and a full disk: data is synced before it is renamed into place."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError name the file, as those of writing and syncing do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to, which is synced and renamed to `path` if all goes well.

    Each process has its own, so that of several writers the last one wins and nobody reads half a file. Anything but a
    regular file (/dev/stdout) is written directly. Raises OSError.
    """
    if path.exists() and not path.is_file():  # before it is resolved: a pipe has no path
        yield path
        return
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
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


def write_all(file: IO[bytes], content: bytes) -> None:
    """Write to a file without a buffer, which would try again to write what had failed when it is closed.

    Raises OSError.
    """
    while content:
        content = content[file.write(content) :]


def append_synced(path: Path, content: bytes) -> None:
    """Add to a file, which is on the disk when this returns; if that fails it ends where it did. Raises OSError."""
    with naming(path), path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            write_all(file, content)
            os.fsync(file.fileno())
        except BaseException:
            file.truncate(end)
            raise


@contextmanager
def staging(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder `name` inside `folder`, to write files in that `install` moves; removed if that fails."""
    staged = folder / name
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def install(staged: Path, folder: Path, names: Iterable[str], last: str, stale: Iterable[Path] = ()) -> None:
    """Move synced files from `staged` into `folder`, remove those that are stale, and then `staged`.

    last: the file without which the others count for nothing. It is there only while all of them belong together. If
    this is interrupted, calling it again finishes the work. Raises OSError.
    """
    (folder / last).unlink(missing_ok=True)
    for name in sorted(names):
        if (staged / name).exists():  # else it was moved before the interruption
            (staged / name).rename(folder / name)
    for path in stale:
        path.unlink(missing_ok=True)
    sync(folder)
    (staged / last).rename(folder / last)
    sync(folder)
    shutil.rmtree(staged, ignore_errors=True)
