"""Every measured number in README.md and docs/ comes from a result file; nothing else may look like one."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.update_figures import (
    RESULTS,
    ROOT,
    FigureError,
    factor,
    figures,
    look_up,
    rendered,
    table_files,
)
from tests.docs.markdown import NAMES, PAGES, having, links, prose, read

LONGEST_LINE = 400

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


@pytest.mark.parametrize("name", having(lambda text: "benchmarks/results/" in text or "<!-- table" in text))
def test_every_number_and_table_is_what_its_result_file_says(name):
    page = ROOT / name
    assert rendered(page, read(page)) == read(page), "run make figures"


@pytest.mark.parametrize("name", having(lambda text: "<!-- table" in text))
def test_a_page_links_to_the_files_of_its_tables(name):
    page = ROOT / name
    linked = {(page.parent / target).resolve() for target in links(read(page))}
    assert {RESULTS / file for file in table_files(page, read(page))} <= linked


@pytest.mark.parametrize("name", NAMES)
def test_no_other_number_looks_measured(name):
    text = prose(read(ROOT / name))
    for allowed in ALLOWED:
        if allowed.page == name:
            text = text.replace(allowed.words, "")
    found = [text[max(0, match.start() - 40) : match.end()].replace("\n", " ") for match in MEASURED.finditer(text)]
    assert not found, "measure these, name their result file, or allow them with a reason"


@pytest.mark.parametrize("allowed", ALLOWED, ids=lambda allowed: allowed.words)
def test_what_is_allowed_is_there_and_a_paper_is_named_beside_its_number(allowed):
    lines = [line for line in read(ROOT / allowed.page).splitlines() if allowed.words in line]
    assert len(lines) == 1
    if allowed.reason.startswith("paper: "):
        assert allowed.reason.removeprefix("paper: ") in lines[0]


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


# --- the renderer -----------------------------------------------------------------------------------------------------

RESULT_FILE = """{"suite": "s", "environment": {"device": "Abacus (R)"}, "results": [
 {"case": "a", "metric": "m", "value": 1234.567, "unit": "tokens/s", "peer": "p", "ratio": 1.255, "spread": [1200, 1300]},
 {"case": "a", "metric": "m", "value": 1234.567, "unit": "tokens/s", "peer": "q", "ratio": 0.5, "spread": [1200, 1300]},
 {"case": "b", "metric": "m", "value": 0.6149, "unit": "share", "peer": null, "ratio": null, "spread": null},
 {"case": "b, Abacus (R)", "metric": "m", "value": 0.3, "unit": "share", "peer": null, "ratio": null, "spread": null}],
 "claims": [
 {"id": "c", "measured": "1.0047 (median of paired ratios)", "interval": [0.99, 1.01], "verdict": "supported"},
 {"id": "d", "measured": "87.26 % (of it)", "interval": [0.8, 0.9], "verdict": "not | supported"},
 {"id": "e", "measured": "never reached", "interval": null, "verdict": "not measurable here"}]}"""  # noqa: E501


@pytest.fixture
def page(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "s.json").write_text(RESULT_FILE)
    (folder / "t.json").write_text(RESULT_FILE.replace("0.6149", "0.25"))
    (tmp_path / "docs").mkdir()
    return tmp_path / "docs" / "page.md"


def render(page: Path, text: str) -> str:
    return rendered(page, text, page.parents[1] / "benchmarks" / "results")


def sentence(shown: str, title: str, file: str = "s.json") -> str:
    return f'# Page\n\nBefore [{shown}][x], after.\n\n[x]: ../benchmarks/results/{file} "{title}"\n'


@pytest.mark.parametrize(
    ("old", "title", "new"),
    [
        ("9.99 ×", "a | m | ratio | p", "1.25 ×"),  # 1.255 in binary lies below the half
        ("9 ×", "a | m | ratio | q", "0 ×"),
        ("1 tok/s", "a | m | value | p", "1235 tok/s"),
        ("1,000.0 tokens/s", "a | m | value | p", "1,234.6 tokens/s"),
        ("1.0 ktokens/s", "a | m | value | p", "1.2 ktokens/s"),
        ("1", "a | m | low | p", "1200"),
        ("1", "a | m | high | p", "1300"),
        ("50 %", "b | m | value", "61 %"),
        ("50 %", "b, {device} | m | value", "30 %"),
        ("0.9", "claim | c | measured", "1.0"),
        ("0.9 ×", "claim | c | high", "1.0 ×"),
        ("9.9 %", "claim | d | measured", "87.3 %"),
        ("9.9 %", "claim | d | low", "80.0 %"),
    ],
)
def test_the_number_changes_and_unit_and_decimals_stay(page, old, title, new):
    assert render(page, sentence(old, title)) == sentence(new, title)


def test_one_definition_serves_every_place_and_other_links_are_left_alone(page):
    text = '[9.99 ×][x], [9 ×][x], [word][other]\n\n[x]: ../benchmarks/results/s.json "a | m | ratio | p"\n'
    text += '[other]: page.md "1.5 ×"\n'
    assert render(page, text) == text.replace("9.99 ×", "1.25 ×").replace("9 ×", "1 ×")
    assert [(figure.where, figure.title) for figure in figures(page, text)] == [("page.md:1", "a | m | ratio | p")] * 2


def table(columns: str, rows: str = "name\na\nb", more: str = "") -> str:
    return f'<!-- table: s.json\n{more}rows = """\n{rows}\n"""\n[columns]\n{columns}\n-->\n<!-- end -->\n'


@pytest.mark.parametrize(
    ("columns", "rows", "more", "body"),
    [
        (
            '"case" = "`{name}`"\n"rate" = "[0,000.0 tok/s]({name} | m | value | p)"\n'
            '"t" = "[0 %](t.json | b | m | value)"',
            "name\na\nb",
            "",
            ["| case | rate | t |", "| --- | ---: | ---: |", "| `a` | 1,234.6 tok/s | 25 % |", "| `b` |  | 25 % |"],
        ),
        (
            '"" = "{what}"\n"share" = "[0 %]({case} | {metric} | value) of {whole}"',
            "what | case\nit   | b",
            'metric = "m"\nwhole = 1\n',
            ["|  | share |", "| --- | ---: |", "| it | 61 % of 1 |"],
        ),
        (
            '"id" = "{id}"\n"interval" = "[{form}](claim | {id} | low) to [{form}](claim | {id} | high)"\n'
            '"verdict" = "[](claim | {id} | verdict)"',
            "id | form\nc | 0.00 ×\nd | 0 %\ne | 0",
            "",
            [
                "| id | interval | verdict |",
                "| --- | ---: | ---: |",
                "| c | 0.99 × to 1.01 × | supported |",
                "| d | 80 % to 90 % | not \\| supported |",
                "| e |  | not measurable here |",
            ],
        ),
        ('"on it" = "[0 %](b, {device} | m | value)"', "x\n1", "", ["| on it |", "| ---: |", "| 30 % |"]),
    ],
)
def test_a_table_is_written_from_its_description_and_stays_when_nothing_changes(page, columns, rows, more, body):
    text = f"Before.\n\n{table(columns, rows, more)}\nAfter.\n"
    new = render(page, text)
    assert new == text.replace("-->\n<!--", "-->\n\n" + "\n".join(body) + "\n\n<!--")
    assert render(page, new) == new
    assert table_files(page, new) == ({"s.json", "t.json"} if "t.json" in columns else {"s.json"})
    assert MEASURED.findall(prose(new)) == []


def test_a_number_that_was_changed_by_hand_in_a_table_is_set_right(page):
    new = render(page, table('"rate" = "[0 tok/s]({name} | m | value | p)"', "name\na"))
    assert render(page, new.replace("1235", "1500")) == new


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1.2 ×][x]", r"page.md:1: \[x\] is not defined"),
        ('words\n\n[x]: ../benchmarks/results/s.json "a | m | ratio | p"', r"\[x\] is defined and nowhere shown"),
        (sentence("words", "a | m | ratio | p"), r"page.md:3: a figure must read \[NUMBER UNIT\]"),
        ('[1][s]\n[s]: ../benchmarks/results/s.json "b | m | value"\n' * 2, r"page.md:4: \[s\] is defined twice"),
        ('[1 ×](../benchmarks/results/s.json "a | m | ratio | p")', r"page.md:1: write \[NUMBER UNIT\]\[LABEL\]"),
        (sentence("1 ×", "a | m | ratio"), r"page.md:3: .*2 results are called"),
        (sentence("1 ×", "z | m | ratio"), r"0 results are called 'z \| m \| ratio'; it has \d, the nearest: a \| m"),
        (sentence("1 ×", "b | m | ratio"), r"this result has no 'ratio'"),
        (sentence("1 ms", "a | m | value | p"), r"measured in 'tokens/s' and shown in 'ms'"),
        (sentence("1", "claim | z | low"), r"there is no claim 'z'; it has: c, d"),
        (sentence("1", "a | m"), r"is not CASE \| METRIC \| FIELD"),
        (sentence("1", "b | m | value", "z.json"), r"z.json cannot be read"),
        ("<!-- table: s.json\n-->\n| a |\n", r"a table reads <!-- table: FILE.json"),
        ("\n" + table("a = b"), r"page.md:2: the description of the table cannot be read"),
        ("<!-- table: s.json\n-->\n<!-- end -->", r"the description of the table cannot be read: 'columns'"),
        (table('"a" = "{b}"'), r"no field is called \{b\}; there are: device, name"),
        (table('"a" = "{b}"', "a | b\n1"), r"the row '1' does not have the fields 'a \| b'"),
        (table('"a" = "[0]({name} | m | value | p)"', "name\nb\nz"), r"s.json has no number for the row 'b'"),
        (
            table('"a" = "[0]({name} | m | value)"\n"z" = "[0]({name} | z | low)"', "name\nb"),
            r"s.json has no number for the column 'z'",
        ),
        (table('"a" = "[some]({name} | m | value | p)"'), r"'some' is no number with a unit"),
        (table('"a" = "[](a | m | value)"'), r"is no text of a claim"),
    ],
)
def test_what_names_no_number_is_an_error_that_says_where(page, text, message):
    with pytest.raises(FigureError, match=message):
        render(page, text)


def test_no_number_hides_in_a_link_that_is_no_figure():
    hidden = '[1.3 ×][mine], [1.4 ×](page.md "a title"), [1.5 ×](benchmarks/results/s.json)'
    definitions = '[x]: benchmarks/results/s.json "a | m | ratio | p"\n[mine]: page.md "a title"'
    assert MEASURED.findall(prose(f"[1.25 ×][x] and {hidden}\n\n{definitions}\n")) == ["1.3 ×", "1.4 ×", "1.5 ×"]


def test_figures_in_code_and_comments_are_left_alone(page):
    shown, definition = "[9.99 ×][x]", '\n[x]: ../benchmarks/results/s.json "a | m | ratio | p"\n'
    example = table('"a" = "[0]({name} | m | value | p)"')
    code = f"```\n{shown}\n{example}```\n<!-- {shown} -->\n`{shown}`\n"
    assert render(page, f"{code}{shown}\n{definition}") == f"{code}[1.25 ×][x]\n{definition}"


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
    assert sum(len(figures(page, read(page))) for page in PAGES) >= 100
    assert sum(len(table_files(page, read(page))) for page in PAGES) >= 15
