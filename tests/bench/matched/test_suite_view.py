"""What a suite shows while it runs."""

import io

from rich.console import Console

from nanochat_cli.bench.matched.suite_runs import Reading
from nanochat_cli.bench.matched.suite_view import SuiteView
from nanochat_cli.report.reporter import PlainReporter, RichReporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_every_ten_seconds_with_both_times_to_go():
    clock, err = Clock(), io.StringIO()
    with SuiteView(PlainReporter(io.StringIO(), err), ["a-seed0", "b-seed0", "c-seed0"], clock=clock) as view:
        view.start(0)
        clock.now = 5.0
        view.update(Reading(5, 20, 4.0))
        clock.now = 10.0
        view.update(Reading(10, 20, 3.5, 2.25, 1234.0, 5_000_000))
        clock.now = 20.0
        view.finish("finished")
        view.start(1)
        clock.now = 25.0
        view.update(Reading(1, 20, 5.0))
        clock.now = 31.0
        view.update(Reading(4, 20, 3.5))
        clock.now = 32.0
        view.finish("diverged", "the loss is nan")
    assert err.getvalue().splitlines() == [
        "[1/3] a-seed0: starts",
        "[1/3] a-seed0: step 10/20, loss 3.500, 2.250 bits per byte, 1,234 tok/s, 5.00 MB, suite ETA –",
        "[1/3] a-seed0: finished after 0:20, step 10/20, loss 3.500, 2.250 bits per byte, 1,234 tok/s, 5.00 MB",
        "[2/3] b-seed0: starts",
        "[2/3] b-seed0: step 4/20, loss 3.500, suite ETA 0:52",  # 16 steps at 2 s, and one more run of 20 s
        "[2/3] b-seed0: diverged after 0:12, the loss is nan",
    ]


def test_a_continued_run_counts_only_the_steps_of_this_process():
    clock = Clock()
    view = SuiteView(PlainReporter(io.StringIO(), io.StringIO()), ["a"], clock=clock)
    view.start(0)
    clock.now = 8.0
    view.update(Reading(50, 100))
    assert view.rows[0].eta() is None
    clock.now = 18.0
    view.update(Reading(60, 100))
    assert view.rows[0].eta() == 40.0


def test_a_terminal_shows_a_table_with_a_row_per_run():
    clock, out = Clock(), io.StringIO()
    reporter = RichReporter(io.StringIO(), out)
    reporter.console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with SuiteView(reporter, ["done-seed0", "now-seed0", "later-seed0"], clock=clock) as view:
        view.known(0, "finished")
        view.start(1)
        clock.now = 4.0
        view.update(Reading(2, 4, 3.25, None, 10_000.0))
    shown = out.getvalue()
    for words in ("1 of 3 runs done", "done-seed0", "finished", "2/4", "3.250", "waiting", "later-seed0"):
        assert words in shown
