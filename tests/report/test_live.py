"""The training view: one line per interval in a pipe, a panel on a terminal, and a loop that never waits for it."""

import io
import math
import threading

import pytest
from rich.console import Console
from rich.live import Live

from nanochat_cli.report.live import LiveView, LossHistory
from nanochat_cli.report.reporter import PlainReporter, QuietReporter, RichReporter


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def on_terminal(**console: object) -> tuple[RichReporter, io.StringIO]:
    reporter, screen = RichReporter(), io.StringIO()
    settings: dict[str, object] = {"force_terminal": True, "width": 100, "color_system": None} | console
    reporter.console = Console(file=screen, **settings)  # pyright: ignore[reportArgumentType]  # keywords of Console
    return reporter, screen


def test_lines_come_once_per_interval_and_hold_everything() -> None:
    log, clock = io.StringIO(), Clock()
    with LiveView(PlainReporter(err=log), 40, 10, peak_flops=98e9, clock=clock) as view:
        for step in range(1, 21):
            clock.now += 3.0
            view.update(
                step, loss=10.0 - step / 10, lr=0.02, grad_norm=0.5, tokens_per_second=12_345, data_wait_ms=0.25
            )
            view.update(step, utilisation=0.612, skipped=step // 15)
        view.update(20, eval_loss=8.1, bits_per_byte=2.25)
        view.event("checkpoint saved")
    assert log.getvalue().splitlines() == [
        "step 10/40  loss 9.0000  lr 0.02  grad norm 0.5  skipped 0  12.3K tok/s  61% of 98 GFLOP/s  data wait 0.2 ms"
        "  elapsed 0:30  ETA 1:30",
        "step 20/40  loss 8.0000  lr 0.02  grad norm 0.5  skipped 1  12.3K tok/s  61% of 98 GFLOP/s  data wait 0.2 ms"
        "  elapsed 1:00  ETA 1:00",
        "step 20  held-out loss 8.1000  2.2500 bits per byte",
        "checkpoint saved",
    ]


def test_the_last_step_has_a_line_whatever_the_interval() -> None:
    log = io.StringIO()
    with LiveView(PlainReporter(err=log), 7, 100, clock=Clock()) as view:
        for step in range(1, 8):
            view.update(step, loss=1.0)
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["7/7"]


def test_the_eta_leaves_out_the_first_step_and_follows_a_changed_total() -> None:
    clock = Clock()
    view = LiveView(QuietReporter(), 100, 10, clock=clock)
    assert view.eta() is None
    clock.now += 60  # compilation
    view.update(1)
    assert view.eta() is None
    clock.now += 8
    view.update(5)
    assert view.eta() == pytest.approx(95 * 2)
    view.total_steps = 15
    assert view.eta() == pytest.approx(10 * 2)
    view.update(20)
    assert view.eta() == 0


def test_a_terminal_shows_the_panel_with_everything_and_events_above_it() -> None:
    reporter, screen = on_terminal()
    clock = Clock()
    with LiveView(reporter, 1000, 10, title="quickstart", peak_flops=98e9, clock=clock) as view:
        for step in range(1, 101):
            clock.now += 1
            view.update(step, loss=9 / step, lr=0.02, grad_norm=0.51, tokens_per_second=12_345, utilisation=0.61)
        view.update(100, eval_loss=3.25, bits_per_byte=2.125, data_wait_ms=0.5, skipped=2)
        view.event("checkpoint saved")
    drawn = screen.getvalue()
    last = drawn[drawn.rindex("quickstart") :]
    for text in (
        "step 100 of 1,000", "10%", "elapsed 1:40", "ETA 15:00", "loss 0.0900", "█", "held-out loss 3.2500",
        "2.1250 bits per byte", "12.3K tok/s", "61% of 98 GFLOP/s", "data wait 0.5 ms", "lr 0.02", "grad norm 0.51",
        "skipped 2",
    ):  # fmt: skip
        assert text in last, text
    assert "checkpoint saved" in drawn


def test_updates_leave_the_drawing_to_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, _ = on_terminal()
    drawing_threads: list[int] = []
    refresh = Live.refresh

    def recorded(self: Live) -> None:
        drawing_threads.append(threading.get_ident())
        refresh(self)

    monkeypatch.setattr(Live, "refresh", recorded)
    with LiveView(reporter, 1000, 1, clock=Clock()) as view:
        assert drawing_threads == [threading.get_ident()], "drawn once on entering"
        drawing_threads.clear()
        for step in range(1, 500):
            view.update(step, loss=1.0)
        assert threading.get_ident() not in drawing_threads


@pytest.mark.parametrize("console", [{"force_terminal": False}, {"_environ": {"TERM": "dumb"}}], ids=["pipe", "dumb"])
def test_a_console_that_cannot_redraw_gets_lines(console: dict[str, object]) -> None:
    reporter, screen = on_terminal(**console)
    with LiveView(reporter, 2, 1, clock=Clock()) as view:
        view.update(1, loss=2.0)
    assert screen.getvalue().startswith("step 1/2  loss 2.0000")
    assert "╭" not in screen.getvalue()


def test_the_panel_is_taken_down_when_training_fails() -> None:
    reporter, screen = on_terminal()
    with pytest.raises(ZeroDivisionError), LiveView(reporter, 2, 1) as view:
        view.update(1, loss=1 / 0)
    assert screen.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_a_misspelt_reading_is_refused() -> None:
    with pytest.raises(TypeError, match=r"not 'los'"):
        LiveView(QuietReporter(), 1, 1).update(1, los=2.0)


def test_the_history_is_bounded_and_its_points_are_means_of_equal_stretches() -> None:
    history = LossHistory(capacity=8)
    for value in range(64):
        history.add(float(value))
    history.add(math.nan)
    stretch = 64 // len(history.values)
    assert len(history.values) < 8
    assert history.values == [sum(range(i, i + stretch)) / stretch for i in range(0, 64, stretch)]


def test_slow_steps_are_not_silent_until_the_interval_is_full() -> None:
    log, clock = io.StringIO(), Clock()
    with LiveView(PlainReporter(err=log), 100, 10, clock=clock) as view:
        for step in range(1, 6):
            clock.now += 20.0
            view.update(step, loss=1.0)
    assert [line.split()[1] for line in log.getvalue().splitlines()] == ["2/100", "4/100"]


def test_an_evaluation_moves_has_its_own_eta_and_says_what_it_has_read() -> None:
    log, clock = io.StringIO(), Clock()
    with LiveView(PlainReporter(err=log), 10, 100, clock=clock) as view:
        view.phase("compiling, first step")
        for step in (1, 10):
            clock.now += 1.0
            view.update(step, loss=3.0)
            view.phase()
        log.truncate(0)
        log.seek(0)
        for done in range(40):
            view.phase("evaluating", done, 40)
            clock.now += 1.0
        view.phase()
        view.update(10, eval_loss=3.0, bits_per_byte=1.5, eval_scope="all documents")
    assert log.getvalue().splitlines() == [
        "step 10: evaluating 2 of 40, ETA 0:38",
        "step 10: evaluating 12 of 40, ETA 0:28",
        "step 10: evaluating 22 of 40, ETA 0:18",
        "step 10: evaluating 32 of 40, ETA 0:08",
        "step 10  held-out loss 3.0000  1.5000 bits per byte (all documents)",
    ]


def test_the_panel_shows_an_evaluation_instead_of_an_eta_of_nothing() -> None:
    reporter, screen = on_terminal()
    clock = Clock()
    with LiveView(reporter, 10, 5, clock=clock) as view:
        view.update(1, loss=3.0)
        clock.now += 9.0
        view.update(10, loss=3.0)
        view.phase("evaluating", 0, 40)
        clock.now += 5.0
        view.phase("evaluating", 10, 40)
        assert view._live is not None
        view._live.refresh()
    last = screen.getvalue().rpartition("step 10 of 10")[2]
    assert "evaluating 10 of 40, ETA 0:15" in last
    assert "ETA 0:00" not in last
