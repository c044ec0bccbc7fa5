"""A report agrees with `report.json`, in Markdown, in HTML and on the screen, and names what is missing."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import pytest

from nanochat_cli.bench.matched.report.comparison import show_comparison, write_comparison
from nanochat_cli.bench.matched.run_record import STATUSES, Suite, write_suite
from nanochat_cli.errors import DataError
from nanochat_cli.report.reporter import PlainReporter
from tests.bench.matched.report.suites import claim, every_status, everything, record, suite, three_seeds
from tests.docs.markdown import Table, tables

GOLDEN = Path(__file__).with_name("golden")
VOID = {"meta", "img"}
HALF_A_DIGIT = 5.0001e-5
"""Bits per byte are shown with four decimals; −0.03125 lies this far from its rounded form."""


class Page(HTMLParser):
    """A page as a browser sees it: text, tags with their attributes, and tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


class Report(NamedTuple):
    """Tables and text of REPORT.md, the HTML page, and report.json as it was written."""

    tables: list[Table]
    text: str
    page: Page
    document: dict[str, Any]


def write(folder: Path, made: Suite) -> Report:
    write_suite(folder, made)
    write_comparison(folder, made)
    text = (folder / "REPORT.md").read_text()
    page = Page((folder / "report.html").read_text())
    return Report(tables(text), text, page, json.loads((folder / "report.json").read_text()))


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of three configurations with three seeds and claims."""
    return write(tmp_path_factory.mktemp("complete"), three_seeds())


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of runs with every status."""
    return write(tmp_path_factory.mktemp("broken"), every_status())


def numbers(cell: str) -> list[float]:
    return [float(found.replace("−", "-").replace(",", "")) for found in re.findall(r"[+−-]?\d[\d,]*(?:\.\d+)?", cell)]


def by_first(table: Table) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}


def test_the_numbers_of_the_runs_are_those_of_the_json(complete: Report) -> None:
    found, _, _, document = complete
    shown = by_first(found[0])
    values: dict[str, dict[int, dict[str, float]]] = {}
    for run in document["runs"]:
        values.setdefault(run["config"], {})[run["seed"]] = run["measures"]
    assert list(shown) == ["baseline", "mtp-only", "muon-8bit"]
    for config, seeds in values.items():
        row = shown[config]
        own = [measures["bits_per_byte"] for measures in seeds.values()]
        assert numbers(row["bits per byte"]) == pytest.approx([mean(own), min(own), max(own)], abs=HALF_A_DIGIT)
        assert row["seeds"] == "3"
        assert numbers(row["tokens/s"]) == [
            pytest.approx(mean(m["tokens_per_second"] for m in seeds.values()), rel=5e-4)
        ]
        memory = mean(m["peak_memory_bytes"] for m in seeds.values())
        assert numbers(row["peak memory"]) == [pytest.approx(memory / 1e6, abs=0.05)]
        if config == "baseline":
            assert row["− baseline"] == "—"
            continue
        paired = [m["bits_per_byte"] - values["baseline"][seed]["bits_per_byte"] for seed, m in seeds.items()]
        assert numbers(row["− baseline"]) == pytest.approx([mean(paired), min(paired), max(paired)], abs=HALF_A_DIGIT)


def test_every_measure_of_every_configuration_is_listed_to_six_digits(complete: Report) -> None:
    found, _, _, document = complete
    (table,) = [t for t in found if t.header[:3] == ["configuration", "measure", "unit"]]
    runs = document["runs"]
    expected = 0
    for run in runs[:3]:
        for name, value in run["measures"].items():
            if value is None:
                continue
            expected += 1
            own = [r["measures"][name] for r in runs if r["config"] == run["config"]]
            rows = [
                row
                for row in table.rows
                if row[0] == run["config"] and float(row[4]) == pytest.approx(min(own), rel=1e-5)
            ]
            assert any(float(row[3]) == pytest.approx(mean(own), rel=1e-5) for row in rows), (run["config"], name)
    assert len(table.rows) == expected == 3 * 13


def test_html_and_markdown_have_the_same_cells(complete: Report) -> None:
    found, _, page, _ = complete
    cells = sum(len(table.rows) * len(table.header) for table in found)
    assert sum(tag == "td" for tag, _ in page.tags) == cells > 100
    texts = {text.strip() for text in page.texts}
    for row in found[0].rows:
        assert set(row) <= texts


def test_the_html_is_whole_and_refers_to_nothing_outside(complete: Report) -> None:
    _, _, page, _ = complete
    assert page.open == []
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "a"})
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert len(references) == 5
    assert all(str(value).startswith("data:image/png;base64,") for value in references)
    style = "".join(page.texts)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_claims_have_verdict_and_interval(complete: Report) -> None:
    found, _, _, _ = complete
    rows = by_first(found[1])
    assert rows["multi-token prediction needs fewer tokens"]["range of the seeds"] == "1.125 … 1.188"
    assert rows["multi-token prediction needs fewer tokens"]["verdict"] == "supported"
    assert rows["a busy loader"]["verdict"] == "not supported (2 seeds only)"
    assert rows["never got there"]["range of the seeds"] == "—"
    assert rows["never got there"]["verdict"] == "not measurable here"


def test_runs_that_did_not_finish_are_rows_that_say_so_and_count_in_no_mean(broken: Report) -> None:
    found, text, page, _ = broken
    status = {row[0]: row[-1] for row in found[0].rows}
    assert sorted(status.values()) == sorted(STATUSES)
    assert status["baseline"] == "finished"
    rows = by_first(found[0])
    assert rows["large"]["bits per byte"] == "—"
    assert rows["large"]["seeds"] == "0/1"
    reasons = by_first(next(t for t in found if "reason" in t.header))
    assert reasons["stopped"]["reason"] == "stopped by SIGINT after step 4"
    assert reasons["silent"]["reason"] == "the process ended with exit code 1"
    assert "4 of 5 runs did not finish" in text
    assert "One seed per configuration" in text
    assert "reason" in page.texts


def test_markup_in_names_and_reasons_is_text(broken: Report) -> None:
    found, text, page, _ = broken
    name = "a|b <script>alert('x')</script> $1$ & *c*"
    assert name in page.texts
    assert "losses <inf> at | step 3" in page.texts
    assert "script" not in {tag for tag, _ in page.tags}
    assert r"a\|b \<script\>alert('x')\</script\> \$1\$ &amp; \*c\*" in text
    assert all(len(row) == len(table.header) for table in found for row in table.rows)


def test_a_measure_that_some_seeds_lack_is_a_mean_of_the_others(tmp_path: Path) -> None:
    lacking = frozenset({"forward_ms", "backward_ms", "optimizer_ms", "peak_memory_bytes"})
    runs = [record("baseline", 1), record("baseline", 2, without=frozenset({"tokens_per_second"}))]
    runs += [record("other", seed, better=0.5, without=lacking) for seed in (1, 2, 3)]
    found, _, _, _ = write(tmp_path, suite(runs))
    rows = by_first(found[0])
    assert rows["baseline"]["tokens/s"] == "684"
    assert rows["other"]["peak memory"] == "—"
    assert rows["other"]["bits per byte"] == "1.2656 (1.2578 … 1.2734)"
    assert numbers(rows["other"]["− baseline"]) == [-0.5, -0.5, -0.5]  # over the two seeds that both have
    assert "tokens to baseline" not in rows["baseline"]  # nobody has it
    steps = by_first(next(t for t in found if "step, ms" in t.header))
    assert steps["other"]["forward, ms"] == "—"
    assert steps["other"]["step, ms"] == "1,500"


def test_seeds_that_the_baseline_did_not_finish_are_not_paired(tmp_path: Path) -> None:
    runs = [record("baseline", 1), record("baseline", 2, status="diverged", reason="NaN at step 2")]
    runs += [record("other", 1, better=0.25), record("other", 2, better=5)]
    found, text, _, _ = write(tmp_path, suite(runs))
    rows = by_first(found[0])
    assert rows["other"]["− baseline"] == "−0.2500"
    assert rows["baseline"]["status"] == "seed 2: diverged"
    assert rows["baseline"]["seeds"] == "1/2"
    assert "1 of 4 runs did not finish" in text


def test_a_suite_in_which_nothing_finished_is_a_report_too(tmp_path: Path) -> None:
    runs = [record(name, 1, status="failed", reason="no data") for name in ("baseline", "other")]
    found, text, _, _ = write(tmp_path, suite(runs))
    assert "No run of the baseline baseline finished" in text
    assert [row[-1] for row in found[0].rows] == ["failed", "failed"]


def test_notes_of_the_suite_are_on_top(tmp_path: Path) -> None:
    _, text, page, _ = write(tmp_path, suite([record("baseline", 1)], notes=["the data differ"]))
    assert "> the data differ" in text
    assert "the data differ" in page.texts
    assert "| notes |" not in text


def test_the_screen_shows_runs_claims_and_failures_and_warns() -> None:
    out, err = io.StringIO(), io.StringIO()
    show_comparison(three_seeds(), PlainReporter(out, err))
    assert re.search(
        r"^mtp-only +3 +1\.7344 \(1\.7266 … 1\.7422\) +−0\.0312 \(−0\.0469 … −0\.0156\)", out.getvalue(), re.M
    )
    assert "not measurable here" in out.getvalue()
    assert err.getvalue() == ""
    show_comparison(every_status(), PlainReporter(out, err))
    assert "out of memory after step 0" in out.getvalue()
    assert "warning: 4 of 5 runs did not finish" in err.getvalue()


@pytest.mark.parametrize("name", ["REPORT.md", "report.html"])
def test_a_page_is_the_committed_one_to_the_last_character(tmp_path: Path, name: str) -> None:
    write_comparison(tmp_path, everything())
    page = re.sub(r"(?<=base64,)[^\"]+", "", (tmp_path / name).read_text())  # pixels depend on matplotlib's version
    assert page == (GOLDEN / name).read_text()


def test_writing_again_gives_the_same_report(tmp_path: Path) -> None:
    made = three_seeds()
    first = {path: path.read_bytes() for path in write_comparison(tmp_path, made)}
    second = {path: path.read_bytes() for path in write_comparison(tmp_path, made)}
    assert first == second
    assert {path.name for path in first} >= {"REPORT.md", "report.html", "claims.png"}


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        write_comparison(tmp_path / "file", suite([record("baseline", 1)], [claim()]))
