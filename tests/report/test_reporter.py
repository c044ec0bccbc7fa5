"""The three reporters: what goes to which stream, and when plain progress prints."""

import io
import json

import pytest

from nanochat_cli.report.quantities import format_duration, format_quantity
from nanochat_cli.report.reporter import PlainReporter, QuietReporter, Reporter, RichReporter, write_json


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def streams() -> tuple[io.StringIO, io.StringIO]:
    return io.StringIO(), io.StringIO()


def test_plain_sends_the_product_to_out_and_the_story_to_err(streams):
    out, err = streams
    reporter = PlainReporter(out, err)
    reporter.info("[bold]plain[/bold]")
    reporter.warn("careful")
    reporter.write("text")
    assert out.getvalue() == "text"
    assert err.getvalue() == "[bold]plain[/bold]\nwarning: careful\n"


def test_quiet_keeps_the_product_and_warnings(streams):
    out, err = streams
    reporter = QuietReporter(out, err)
    reporter.info("story")
    reporter.table("title", ("a",), [(1,)])
    with reporter.progress("work", 10) as progress:
        progress.advance(10)
    reporter.warn("careful")
    reporter.write("text")
    assert (out.getvalue(), err.getvalue()) == ("text", "warning: careful\n")


def test_a_plain_table_aligns_numbers_right(streams):
    out, err = streams
    PlainReporter(out, err).table("sizes", ("name", "count"), [("a", 1_234_567), ("long name", None)])
    assert out.getvalue() == "sizes\nname           count\na          1,234,567\nlong name          —\n"


def test_plain_progress_is_silent_at_first_then_regular_with_rate_and_eta(streams):
    out, err = streams
    clock = Clock()
    with PlainReporter(out, err, clock).progress("encoding", 100e6, "B") as progress:
        for second in range(1, 26):
            clock.now = float(second)
            progress.advance(4e6)
    lines = err.getvalue().splitlines()
    assert lines == [
        "encoding: 8% (8.00 MB), 4.00 MB/s, ETA 0:23",
        "encoding: 48% (48.0 MB), 4.00 MB/s, ETA 0:13",
        "encoding: 88% (88.0 MB), 4.00 MB/s, ETA 0:03",
        "encoding: 100.0 MB in 0:25 (4.00 MB/s)",
    ]
    assert out.getvalue() == ""


def test_plain_progress_is_silent_during_a_short_wait(streams):
    _, err = streams
    with PlainReporter(*streams, Clock()).progress("encoding", 10) as progress:
        progress.advance(10)
    assert err.getvalue() == ""


def test_plain_progress_without_a_total_has_no_eta(streams):
    _, err = streams
    clock = Clock()
    with PlainReporter(*streams, clock).progress("reading", unit="documents") as progress:
        clock.now = 4.0
        progress.advance(20)
    assert err.getvalue().splitlines() == [
        "reading: 20 documents, 5 documents/s",
        "reading: 20 documents in 0:04 (5 documents/s)",
    ]


def test_progress_that_fails_does_not_claim_to_have_finished(streams):
    _, err = streams
    clock = Clock()

    def fail() -> None:
        with PlainReporter(*streams, clock).progress("reading", 10):
            clock.now = 60.0
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert err.getvalue() == ""


def test_rich_prints_square_brackets_as_they_are(streams):
    out, err = streams
    reporter = RichReporter(out, err)
    reporter.info("[model] n_heads [bold]")
    reporter.warn("[red]")
    reporter.table("[title]", ("[column]",), [("[cell]",)])
    with reporter.progress("[work]", 10, "B") as progress:
        progress.advance(10)
    assert "[model] n_heads [bold]" in err.getvalue()
    assert "[red]" in err.getvalue()
    for text in ("[title]", "[column]", "[cell]"):
        assert text in out.getvalue()


def test_every_voice_collects_results_and_json_holds_them(tmp_path, streams):
    for voice in (PlainReporter, QuietReporter, RichReporter):
        reporter: Reporter = voice(*streams)
        reporter.result({"a": 1, "path": tmp_path})
        reporter.result({"a": 2})
        write_json(tmp_path / "result.json", reporter.results)
        assert json.loads((tmp_path / "result.json").read_text()) == {"a": 2, "path": str(tmp_path)}


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (0.25, "steps", "0.25 steps"),
        (999, "tokens", "999 tokens"),
        (1234, "tokens", "1,234 tokens"),
        (12_345, "tokens", "12.3K tokens"),
        (1_234_567, "tokens", "1.23M tokens"),
        (2.5e9, "tokens", "2.50B tokens"),
        (512, "B", "512 B"),
        (20_000, "B", "20.0 kB"),
        (1_234_567, "B", "1.23 MB"),
        (3e9, "B", "3.00 GB"),
    ],
)
def test_quantities(value, unit, text):
    assert format_quantity(value, unit) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3599.6, "1:00:00"), (3700, "1:01:40")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
