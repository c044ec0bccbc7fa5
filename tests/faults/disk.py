"""The disk that fails on demand: `failing_disk.c`, compiled, and its switches in a process that has loaded it."""

import ctypes
import errno
import os
import shutil
import subprocess
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_name("failing_disk.c")


class Kind(IntEnum):
    """What an operation does, numbered as in the C source."""

    OPEN_READ = 0
    OPEN_WRITE = 1
    READ = 2
    WRITE = 3
    STREAM = 4
    SYNC = 5
    RENAME = 6
    MKDIR = 7
    UNLINK = 8
    TRUNCATE = 9


class Fault(NamedTuple):
    """error: 0 for half a transfer. stays: every later operation of these kinds fails too, as on a full disk."""

    name: str
    error: int
    stays: bool
    kinds: frozenset[Kind]


_CHANGES = frozenset({Kind.OPEN_WRITE, Kind.RENAME, Kind.MKDIR, Kind.UNLINK})
FAULTS = (
    Fault("ENOSPC", errno.ENOSPC, True, frozenset({*(_CHANGES - {Kind.UNLINK}), Kind.WRITE, Kind.STREAM, Kind.SYNC})),
    Fault("EIO", errno.EIO, False, frozenset(Kind)),
    Fault("EROFS", errno.EROFS, True, _CHANGES),
    Fault("EINTR", errno.EINTR, False, frozenset(Kind) - {Kind.STREAM}),
    Fault("short", 0, False, frozenset({Kind.READ, Kind.WRITE})),
)


def compiler() -> str | None:
    """The C compiler that a person has chosen, or that is there."""
    return os.environ.get("CC") or shutil.which("cc")


def build(folder: Path) -> Path:
    """The library to preload, compiled into `folder`."""
    library = folder / "failing_disk.so"
    command = [compiler() or "cc", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-o", str(library)]
    subprocess.run([*command, str(SOURCE), "-ldl"], check=True)
    return library


class Disk:
    """The operations below one folder, in a process that was started with the library preloaded."""

    def __init__(self, folder: Path) -> None:
        self._library = ctypes.CDLL(None)
        self._library.faults_kinds.restype = ctypes.POINTER(ctypes.c_ubyte)
        for name in ("faults_count", "faults_struck"):
            getattr(self._library, name).restype = ctypes.c_long
        self._library.faults_watch(os.fsencode(folder.resolve()))

    def arm(self, number: int, fault: Fault) -> None:
        """Count from 0 again, and let the operation of this number fail if the fault can strike its kind."""
        bits = sum(1 << kind for kind in fault.kinds)
        self._library.faults_arm(ctypes.c_long(number), fault.error, int(fault.stays), bits)

    def disarm(self) -> None:
        """Count from 0 again; nothing fails."""
        self._library.faults_arm(ctypes.c_long(0), 0, 0, 0)

    @property
    def seen(self) -> list[Kind]:
        """The operations since the count began."""
        return [Kind(kind) for kind in self._library.faults_kinds()[: self._library.faults_count()]]

    @property
    def struck(self) -> int:
        """How many of them failed."""
        return self._library.faults_struck()
