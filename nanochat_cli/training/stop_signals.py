"""Graceful stop: turns the first SIGINT or SIGTERM into a flag that the training loop polls between steps.

Knows signals only; saving the state and raising `Interrupted` is the trainer's affair.
"""

import signal
import threading
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`with StopSignals() as stop: ... if stop.requested: ...`

    The first signal sets `requested` and puts the previous handlers back, so that a second one acts at once as it
    would have without us (Ctrl-C raises KeyboardInterrupt, SIGTERM ends the process). A signal that was ignored
    (as SIGINT is under nohup) stays ignored. Outside the main thread, where Python cannot set handlers, it does
    nothing.
    """

    def __init__(self) -> None:
        self._previous: dict[int, object] = {}
        self._received: signal.Signals | None = None

    @property
    def requested(self) -> bool:
        """True once a signal has arrived."""
        return self._received is not None

    @property
    def name(self) -> str | None:
        """Name of the signal that arrived, such as "SIGTERM"."""
        return None if self._received is None else self._received.name

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal itself returned
        self._previous.clear()
