"""The first signal requests a stop, the second enforces it, and the handlers do not outlive the `with`."""

import os
import pty
import signal
import sys
import threading
from pathlib import Path

import pytest

from nanochat_cli.training.stop_signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_signal_only_sets_the_flag(number: signal.Signals) -> None:
    with StopSignals() as stop:
        assert not stop.requested
        assert stop.name is None
        signal.raise_signal(number)
        assert stop.requested
        assert stop.name == number.name


def test_the_second_interrupt_is_immediate() -> None:
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("signalled", [False, True])
def test_the_previous_handlers_come_back(signalled: bool) -> None:
    received: list[int] = []

    def previous_handler(number: int, frame: object) -> None:
        received.append(number)

    original = signal.signal(signal.SIGTERM, previous_handler)
    try:
        with StopSignals():
            if signalled:
                signal.raise_signal(signal.SIGTERM)
        assert received == []
        assert signal.getsignal(signal.SIGTERM) is previous_handler
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, original)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    original = signal.signal(number, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(number)
            assert not stop.requested
    finally:
        signal.signal(number, original)


def test_the_consequence_is_announced_at_once_and_once() -> None:
    said: list[str] = []
    with StopSignals(said.append) as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert said == ["SIGUSR1"]
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert (said, stop.name) == (["SIGUSR1"], "SIGUSR1")


def test_a_stream_that_cannot_be_written_does_not_keep_a_run_from_saving() -> None:
    def broken(name: str) -> None:
        raise OSError(5, "Input/output error")

    with StopSignals(broken) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested


CLOSED = """
import signal, sys, time
from nanochat_cli.training.stop_signals import StopSignals
with StopSignals(lambda name: print(name, flush=True)) as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
    for _ in range(20):
        print("a step of the run", file=sys.stderr, flush=True)
    open(sys.argv[1], "w").write(f"saved after {stop.name}")
"""


def test_a_terminal_that_is_closed_does_not_keep_a_run_from_saving(tmp_path: Path) -> None:
    child, master = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CLOSED, str(tmp_path / "state")])
    seen = b""
    while b"ready" not in seen:
        seen += os.read(master, 1024)
    os.close(master)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "state").read_text() == "saved after SIGHUP"


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def body() -> None:
        with StopSignals() as stop:
            seen.extend([stop.requested, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False, before]
