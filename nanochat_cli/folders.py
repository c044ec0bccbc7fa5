"""Locks on folders and files: one process at a time may write, and its lock ends when it does.

The lock is the kernel's (flock) on a hidden file, so `kill -9` releases it and nothing needs cleaning up by hand. The
file names the holder for the next process, and is deleted with the lock. A forked child does not keep the lock.
"""

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.nesting import parse_json

LOCK_FILE = ".lock"
ATTEMPTS = 10

_held: set[int] = set()
"""Descriptors of this process's locks."""


class HeldError(ConfigError):
    """Another process holds the lock; the message says which, and what to do."""


@contextmanager
def held_folder(folder: Path, doing: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Hold `folder`, which is created if it is missing, and removed again if it stayed empty.

    doing: what the holder does with it, such as "trains". waiting: called with a message that names the holder, before
    waiting for it; None: raise HeldError instead. Raises OSError if it cannot be written, DataError if it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"cannot write into {folder}: it is not a folder; choose another place")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        descriptor = _acquire(folder / LOCK_FILE, folder, doing, waiting)
        with _releasing(descriptor, folder / LOCK_FILE):
            yield folder
    finally:
        for path in made:
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def held_file(path: Path, doing: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Like `held_folder`, for a file to be written, which need not exist yet. Raises DataError, not OSError."""
    try:
        descriptor = _acquire(path.with_name(f".{path.name}.lock"), path, doing, waiting)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error
    with _releasing(descriptor, path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def _releasing(descriptor: int, lock: Path) -> Iterator[None]:
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):  # before the lock is released: a process waiting for it sees that the file is gone
            lock.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def holder_of(folder: Path) -> str | None:
    """Who holds a folder now, in words, or None."""
    try:
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(descriptor)[0]
    finally:
        os.close(descriptor)
    return None


def _acquire(lock: Path, what: Path, doing: str, waiting: Callable[[str], None] | None) -> int:
    told = False
    for attempt in count():
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            if attempt < ATTEMPTS:  # another process has just removed the folder that it had created
                continue
            raise
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who, stop = _holder(descriptor)
                if waiting is None:
                    raise HeldError(f"{what}: {who} it; wait until it ends{stop}, and try again") from None
                if not told:
                    waiting(f"{what}: {who} it; waiting for it")
                    told = True
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_still_there(descriptor, lock):
                _write_holder(descriptor, doing)
                return descriptor
        except OSError as error:
            os.close(descriptor)
            raise DataError(f"{lock}: cannot be locked: {error.strerror}; choose another file system") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a lock on a file that its holder has removed guards nothing
    raise AssertionError("unreachable")


def _is_still_there(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, doing: str) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
    with suppress(OSError):  # on a full disk the lock works without a name too
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> tuple[str, str]:
    """The holder and what it does, as the start of a sentence, and how to stop it."""
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
        pid, host, since, doing = int(holder["pid"]), holder["host"], holder["since"], holder["doing"]
    except (ValueError, KeyError, TypeError):  # it has the lock but has not written its name yet
        return "another process holds", ""
    elsewhere = "" if host == socket.gethostname() else f" on {host}"
    return f"process {pid}{elsewhere} (since {since}) {doing}", f" or stop it (kill {pid}{elsewhere})"


def _close_in_child() -> None:
    """A lock belongs to an open file, which a fork shares: the child must not keep it after the parent has ended."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
