"""What a reader may do with any bytes: succeed, or refuse in one line; within a bounded time and memory."""

import resource
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from nanochat_cli.errors import NanochatError

SECONDS = 10
"""Processor time that one reading may take, also on a busy machine."""
MEMORY = 2 << 30
"""Bytes of address space that it may add."""


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


def breach(read: Callable[[bytes], object], data: bytes) -> str | None:
    """How reading `data` breaks the contract: the last lines of the traceback; None if it does not."""
    try:
        with _bounded_time():
            read(data)
    except NanochatError as error:
        return None if "\n" not in str(error).strip() else f"an error of several lines: {error}"
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - a panic of a Rust library is no Exception
        return "".join(traceback.format_exc().splitlines(keepends=True)[-5:])
    return None


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Raise TooSlow in the main thread after SECONDS of processor time."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """This process may add MEMORY bytes of address space; what needs more gets a MemoryError."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
