"""The first signal asks, the second acts, and nothing of it outlives the `with`."""

import signal
import threading

import pytest

from nanochat_cli.training.stop_signals import StopSignals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_an_ignored_signal_stays_ignored() -> None:
    original = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, original)


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
