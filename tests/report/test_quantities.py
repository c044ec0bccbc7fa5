"""Durations as a person reads them."""

import pytest

from nanochat_cli.report.quantities import counted, format_duration, format_span

DAY = 86_400


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (47 * 3600, "47:00:00"), (2.34 * DAY, "2.3 days")],
)
def test_a_clock_counts_to_two_days(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.012, "0.012 s"),
        (42, "42 s"),
        (300, "5 min"),
        (3600, "1 h 00 min"),
        (12.5 * 3600, "12 h 30 min"),
        (3 * DAY, "3.0 days"),
        (65548 * 3600 + 86, "7.5 years"),
        (4000 * 365.25 * DAY, "4,000 years"),
    ],
)
def test_a_span_is_in_its_most_readable_unit(seconds, text):
    assert format_span(seconds) == text


def test_one_document_is_not_one_documents():
    assert [counted(n, "document") for n in (0, 1, 1730)] == ["0 documents", "1 document", "1,730 documents"]
