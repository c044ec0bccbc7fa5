"""Every measured number in README.md and docs/ comes from a result file; nothing else may look like one."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.update_figures import (
    LONGEST_LINE,
    ROOT,
    FigureError,
    factor,
    figures,
    look_up,
    shortened,
    shown,
    updated,
    without_code,
)
from tests.docs.markdown import NAMES, PAGES, having, prose, read

MEASURED = re.compile(
    r"(?<![\w.])\d[\d.,]*\s?"
    r"(?:×(?!\s?\d)|%|tok/s|tokens/s|tokens per second|[kMG]B/s|[MGT]?FLOP/s|ms\b|bits per byte|bits/byte|bpb\b)"
)


class Allowed(NamedTuple):
    """A number that is not ours to measure: the words it stands in, exactly, and why it may stand there."""

    page: str
    words: str
    reason: str


ALLOWED = [
    Allowed("docs/training.md", "10 % above its float twin at 100 M parameters", "paper: arXiv:2407.12327"),
]


@pytest.mark.parametrize("name", having(lambda text: re.search(r'benchmarks/results/\S+\.json "', without_code(text))))
def test_every_figure_equals_its_result_file_to_the_digits_shown(name):
    page = ROOT / name
    found = figures(page, read(page))
    assert found
    for figure in found:
        assert f"{figure.number} {figure.unit}".rstrip() == shown(figure), f"{figure.where}: make the figures anew"


@pytest.mark.parametrize("name", NAMES)
def test_no_other_number_looks_measured(name):
    text = prose(read(ROOT / name))
    for allowed in ALLOWED:
        if allowed.page == name:
            text = text.replace(allowed.words, "")
    found = [text[max(0, match.start() - 40) : match.end()].replace("\n", " ") for match in MEASURED.finditer(text)]
    assert not found, "measure these, link them to a result file, or allow them with a reason"


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda allowed: allowed.words)
def test_what_is_allowed_is_there_and_a_paper_is_named_beside_its_number(allowed):
    lines = [line for line in read(ROOT / allowed.page).splitlines() if allowed.words in line]
    assert len(lines) == 1
    if allowed.reason.startswith("paper: "):
        assert allowed.reason.removeprefix("paper: ") in lines[0]


def rows_with_figures(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("|") and '.json "' in line]


@pytest.mark.parametrize("name", having(rows_with_figures))
def test_titles_inside_tables_escape_their_bars(name):
    # An unescaped bar would end the cell of the table.
    for line in rows_with_figures(read(ROOT / name)):
        assert not re.search(r'\.json "[^"]*(?<!\\)\|', line), line


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_longer_than_a_reader_of_the_source_can_take(name):
    lines = enumerate(read(ROOT / name).splitlines(), start=1)
    assert [f"{name}:{number}" for number, line in lines if len(line) > LONGEST_LINE] == []


@pytest.mark.parametrize(
    "words", ["1.7 × faster", "12 % less", "9,000 tokens/s", "about 3 ms", "2.1 bits per byte", "40 GFLOP/s", "2 MB/s"]
)
def test_what_looks_measured_is_recognised(words):
    assert MEASURED.search(words)


@pytest.mark.parametrize("words", ["768 × 12 layers", "1.58-bit", "a 4 MB file", "twice", "3 items", "2407.12327"])
def test_what_does_not_look_measured_is_left_alone(words):
    assert not MEASURED.search(words)


# --- the updater ------------------------------------------------------------------------------------------------------

RESULTS = """{"suite": "s", "environment": {}, "results": [
 {"case": "a", "metric": "m", "value": 1234.567, "unit": "tokens/s", "peer": "p", "ratio": 1.255, "spread": [1200, 1300]},
 {"case": "a", "metric": "m", "value": 1234.567, "unit": "tokens/s", "peer": "q", "ratio": 0.5, "spread": [1200, 1300]},
 {"case": "b", "metric": "m", "value": 0.6149, "unit": "share", "peer": null, "ratio": null, "spread": null}],
 "claims": [{"id": "c", "measured": "1.0047 (median of paired ratios)", "interval": [0.99, 1.01]},
  {"id": "d", "measured": "87.26 % (of it)", "interval": [0.8, 0.9]}]}"""  # noqa: E501


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "s.json").write_text(RESULTS)
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs" / "page.md"


def link(text: str, title: str) -> str:
    return f'[{text}](../benchmarks/results/s.json "{title}")'


@pytest.mark.parametrize(
    ("old", "title", "new"),
    [
        ("9.99 ×", "a | m | ratio | p", "1.25 ×"),  # 1.255 in binary lies below the half
        ("9 ×", "a | m | ratio | q", "0 ×"),
        ("1 tok/s", "a | m | value | p", "1235 tok/s"),
        ("1,000.0 tokens/s", "a | m | value | p", "1,234.6 tokens/s"),
        ("1.0 ktokens/s", "a | m | value | p", "1.2 ktokens/s"),
        ("1", "a | m | low | p", "1200"),
        ("1", r"a \| m \| high \| p", "1300"),
        ("50 %", "b | m | value", "61 %"),
        ("0.9", "claim | c | measured", "1.0"),
        ("0.9 ×", "claim | c | high", "1.0 ×"),
        ("9.9 %", "claim | d | measured", "87.3 %"),
        ("9.9 %", "claim | d | low", "80.0 %"),
    ],
)
def test_the_number_changes_and_unit_and_decimals_stay(page, old, title, new):
    text = f"# Page\n\nBefore {link(old, title)}, after.\n"
    assert updated(page, text) == f"# Page\n\nBefore {link(new, title)}, after.\n"


def test_a_reference_is_a_figure_like_any_other(page):
    target = '../benchmarks/results/s.json "a | m | ratio | p"'
    text = f"| [9.99 ×][s-1] | [9 ×][s-1] | [word][other] |\n\n[s-1]: {target}\n"
    assert updated(page, text) == text.replace("9.99 ×", "1.25 ×").replace("9 ×", "1 ×")
    assert [(figure.line, figure.title) for figure in figures(page, text)] == [(1, "a | m | ratio | p")] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1.2 ×][s-1]", r"page.md:1: \[s-1\] is not defined"),
        ('words\n\n[s-1]: ../benchmarks/results/s.json "a | m | ratio | p"', r"\[s-1\] is defined and nowhere shown"),
        ('[words][s-1]\n\n[s-1]: ../benchmarks/results/s.json "a | m | ratio | p"', r"page.md:1: .* must read"),
        ('[1][s]\n[s]: ../benchmarks/results/s.json "b | m | value"\n' * 2, r"page.md:4: \[s\] is defined twice"),
        ('[1 ms][s]\n\n[s]: ../benchmarks/results/s.json "a | m | value | p"', r"page.md:1: .* shown in 'ms'"),
    ],
)
def test_a_reference_that_names_no_number_is_an_error_that_says_where(page, text, message):
    with pytest.raises(FigureError, match=message):
        updated(page, text)


def test_no_number_hides_in_a_link_that_is_no_figure():
    figure = '[1.25 ×][s-1] and [1.5 ×](benchmarks/results/s.json "a | m | ratio | p")'
    hidden = '[1.3 ×][mine], [1.4 ×](page.md "a title")'
    definitions = '[s-1]: benchmarks/results/s.json "a | m | ratio | p"\n[mine]: page.md "a title"'
    assert MEASURED.findall(prose(f"{figure} {hidden}\n\n{definitions}\n")) == ["1.3 ×", "1.4 ×"]


def test_figures_of_a_long_line_move_to_the_end_of_the_page_and_stay_the_same_figures(page):
    first, second = link("1.25 ×", r"a \| m \| ratio \| p"), link("1,235 tok/s", r"a \| m \| value \| p")
    long = f"| {'words ' * 60}| {first} | {second} | `{first}` | {first} |"
    text = f"Short {second}\n\n{long}\n"
    short = shortened(text)
    assert short.splitlines()[0] == f"Short {second}"
    assert short.splitlines()[2].endswith(f"| [1.25 ×][s-1] | [1,235 tok/s][s-2] | `{first}` | [1.25 ×][s-1] |")
    assert short.splitlines()[-2:] == [
        '[s-1]: ../benchmarks/results/s.json "a | m | ratio | p"',
        '[s-2]: ../benchmarks/results/s.json "a | m | value | p"',
    ]
    told = [[(f.number, f.unit, f.target, f.title) for f in figures(page, each)] for each in (text, short)]
    assert told[0] == told[1]
    assert shortened(short) == short
    again = shortened(long + "\n" + short)
    assert len(again.splitlines()) == len(short.splitlines()) + 1
    assert again.splitlines()[0] == short.splitlines()[2]
    assert shortened("\n".join(short.splitlines()[2:]).replace("[s-2] |", "[s-1] |")).endswith('ratio | p"\n')


def test_figures_in_code_and_comments_are_left_alone(page):
    figure = link("9.99 ×", "a | m | ratio | p")
    text = f"```\n{figure}\n```\n<!-- {figure} -->\n`{figure}`\n{figure}\n"
    assert updated(page, text) == text.removesuffix(f"{figure}\n") + link("1.25 ×", "a | m | ratio | p") + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (link("1 ×", "a | m | ratio"), r"page.md:1: .*2 results are called"),
        (link("1 ×", "z | m | ratio"), r"0 results are called 'z \| m \| ratio'; it has \d, the nearest: a \| m"),
        (link("1 ×", "b | m | ratio"), r"this result has no 'ratio'"),
        (link("1 ms", "a | m | value | p"), r"measured in 'tokens/s' and shown in 'ms'"),
        (link("1", "claim | z | low"), r"there is no claim 'z'; it has: c, d"),
        (link("1", "a | m"), r"is not CASE \| METRIC \| FIELD"),
        (link("about 1", "b | m | value"), r"must read \[NUMBER UNIT\]"),
        ('[1](../benchmarks/results/z.json "b | m | value")', r"z.json cannot be read"),
    ],
)
def test_a_figure_that_names_no_number_is_an_error_that_says_where(page, text, message):
    with pytest.raises(FigureError, match=message):
        updated(page, text)


@pytest.mark.parametrize(
    ("unit", "wanted", "expected"),
    [("FLOP/s", "GFLOP/s", 1e-9), ("MB", "GB", 1e-3), ("s", "ms", 1e3), ("bits/byte", "bpb", 1), ("×", "%", 100)],
)
def test_units_convert_by_prefix_only(unit, wanted, expected):
    assert factor(unit, wanted) == pytest.approx(expected)


def test_a_title_is_looked_up_in_the_committed_form_of_results():
    # The smallest file that nanochat_cli.report.result_file would write.
    result = {"case": "c", "metric": "m", "value": 2.0, "unit": "s", "peer": None, "ratio": None, "spread": (1.0, 3.0)}
    assert look_up({"results": [result], "claims": []}, "c | m | high") == (3.0, "s")


def test_there_are_pages_and_figures_to_check():
    assert {"README.md", "docs/training.md", "docs/exporting.md", "docs/tokenizing.md"} <= set(NAMES)
    assert sum(len(figures(page, read(page))) for page in PAGES) >= 4
