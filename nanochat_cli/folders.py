"""Who may write: folders and files that one process at a time holds, by a lock that ends with its holder.

The lock is the kernel's (flock) on a hidden file, so `kill -9` releases it and nothing has to be cleaned up by hand.
The file names the holder for the one who comes second, and goes when the lock does. A forked child does not keep it.
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
"""Descriptors of the locks of this process."""


class HeldError(ConfigError):
    """Another process holds it; the message says which, and what to do."""


@contextmanager
def held_folder(folder: Path, doing: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[Path]:
    """Hold `folder`, which is made if it is missing, and removed again if nothing came to be in it.

    doing: what the holder does with it, such as "trains". waiting: told who holds it, and then this process waits its
    turn; without it HeldError is raised. Raises OSError when the folder cannot be written, DataError for a file.
    """
    if folder.exists() and not folder.is_dir():
        raise DataError(f"cannot write into {folder}: it is no folder; choose another place")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        descriptor = _acquire(folder / LOCK_FILE, folder, doing, waiting)
        with _letting_go(descriptor, folder / LOCK_FILE):
            yield folder
    finally:
        for path in made:
            with suppress(OSError):  # something is in it
                path.rmdir()


@contextmanager
def held_file(path: Path, doing: str, *, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """As `held_folder`, of a file that is going to be written and need not be there. Raises DataError, not OSError."""
    try:
        descriptor = _acquire(path.with_name(f".{path.name}.lock"), path, doing, waiting)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}; free space or choose another place") from error
    with _letting_go(descriptor, path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def _letting_go(descriptor: int, lock: Path) -> Iterator[None]:
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):  # before the lock goes: whoever waits for this file sees that it is no longer there
            lock.unlink()
        _held.discard(descriptor)
        os.close(descriptor)


def holder_of(folder: Path) -> str | None:
    """Who holds a folder now, as words; None when nobody does."""
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
            if attempt < ATTEMPTS:  # another has just removed the folder that it had made
                continue
            raise
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who, stop = _holder(descriptor)
                if waiting is None:
                    raise HeldError(f"{what}: {who} it; wait until it has ended{stop}, and try again") from None
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
        os.close(descriptor)  # the lock of a file that its holder has removed guards nothing
    raise AssertionError("unreachable")


def _is_still_there(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, doing: str) -> None:
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "doing": doing}
    with suppress(OSError):  # on a full disk the lock is as good without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)


def _holder(descriptor: int) -> tuple[str, str]:
    """The holder and what it does, as the beginning of a sentence, and how to stop it."""
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
        pid, host, since, doing = int(holder["pid"]), holder["host"], holder["since"], holder["doing"]
    except (ValueError, KeyError, TypeError):  # it has the lock and has not written its name yet
        return "another process holds", ""
    elsewhere = "" if host == socket.gethostname() else f" on {host}"
    return f"process {pid}{elsewhere}, since {since}, {doing}", f" or stop it (kill {pid}{elsewhere})"


def _close_in_child() -> None:
    """A lock belongs to an open file, which a fork shares: the child must not keep it when the parent is gone."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
