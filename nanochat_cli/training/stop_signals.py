"""Graceful stop: turns the first signal into a flag that the training loop polls between steps.

Knows signals only; saving the state and raising `Interrupted` are left to the trainer.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

SECOND_ENDS = (signal.SIGINT, signal.SIGTERM)
"""Signals of which a second one acts at once."""
SIGNALS = (*SECOND_ENDS, signal.SIGHUP, signal.SIGUSR1)
"""Signals that stop a run: Ctrl-C, a scheduler or `kill`, a closed terminal, a scheduler's warning."""


class StopSignals:
    """`with StopSignals(say) as stop: ... if stop.requested: ...`

    The first signal sets `requested`, says at once what happens now (`say` is called with its name), and puts the
    previous handlers of SECOND_ENDS back, so that another one of these acts as it would have without us (Ctrl-C raises
    KeyboardInterrupt, SIGTERM ends the process). A terminal that is closed sends SIGHUP more than once, and what is
    written to it afterwards goes nowhere. A signal that was ignored (as SIGHUP is under nohup) stays ignored. Outside
    the main thread, where Python cannot set handlers, it does nothing.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        self._say = say
        self._previous: dict[int, object] = {}
        self._received: signal.Signals | None = None
        self._terminals: list[int] = []

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
            self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore(*self._previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        if self._received is None:
            self._received = signal.Signals(number)
            self._restore(*SECOND_ENDS)
            if self._say is not None:
                with contextlib.suppress(OSError, RuntimeError):  # it may have come while that stream was being written
                    self._say(self._received.name)

    def _leave_terminals(self) -> None:
        """Writing to a closed terminal fails, and would end the run before it has saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._previous:
                handler = self._previous.pop(number)
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal returned
