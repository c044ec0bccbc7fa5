"""A committed result can be traced to a commit without uncommitted changes, and to a machine.

Exceptions are listed with their reason until they are measured again.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.update_figures import ROOT
from nanochat_cli.report import result_file
from nanochat_cli.report.environment import blemish

RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(path.relative_to(RESULTS).as_posix() for path in RESULTS.rglob("*.json"))
FLAGS_SINCE = "2026-11-27"
"""Since this day a result names the instruction sets of its CPU."""

GPU = "decode", "exactness", "forms", "forms-1b", "losses", "roofline", "training-125m", "training-1b"
MEASURE_AGAIN = {
    "architectures.json": "no commit",
    "bitlinear_forms.json": "uncommitted changes",
    # The lent machine's copy had a git that knew only the commit before.
    **{f"gpu/{name}.json": "uncommitted changes" for name in GPU},
    "grpo.json": "uncommitted changes",
    "rust_functions.json": "uncommitted changes",
}
"""File -> why it must be measured again, in the words of `blemish`."""


def environment_of(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8")).get("environment") or {}


@pytest.mark.parametrize("name", FILES)
def test_a_result_was_measured_on_a_clean_commit_or_is_listed_to_be_measured_again(name):
    assert blemish(environment_of(name)) == MEASURE_AGAIN.get(name), (
        "measure it on a clean checkout" if name not in MEASURE_AGAIN else "take it off the list"
    )


@pytest.mark.parametrize("name", FILES)
def test_a_result_names_its_machine(name):
    found = environment_of(name)
    assert found["device"], name
    assert found["cpu"], name
    assert found["cores"] >= 1, name
    assert found["date"] < FLAGS_SINCE or isinstance(found["cpu_flags"], list), name


def test_the_list_names_only_existing_files():
    assert set(MEASURE_AGAIN) <= set(FILES)


def test_runs_of_a_committed_suite_are_of_one_machine_and_commit():
    for name in FILES:
        runs = json.loads((RESULTS / name).read_text(encoding="utf-8")).get("runs", [])
        places = {
            (run["environment"]["device"], run["environment"]["git"]["commit"], run["environment"]["git"]["dirty"])
            for run in runs
            if isinstance(run, dict) and run.get("environment")
        }
        assert len(places) <= 1, Path(name)


@pytest.mark.parametrize("name", FILES)
def test_the_page_says_how_to_measure_a_result_again(name):
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    if name not in rows:
        assert f"`{name}`" in page.partition("Kept as they were measured")[2], "no command and no reason to keep it"
        return
    assert re.search(r"`(python benchmarks/|nanochat )[^`]+`", rows[name])
    scripts = re.findall(r"python (benchmarks/\w+\.py)", rows[name])
    assert all((ROOT / script).is_file() for script in scripts)
    outs = re.findall(r"--(?:out|json|report) (benchmarks/results/\S+?)`", rows[name])
    assert all(name.startswith(out.removeprefix("benchmarks/results/")) for out in outs)


def test_a_quick_run_of_a_script_does_not_write_over_its_committed_result():
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        if '"--quick"' in text:
            assert "result_place(" in text, script.name
            assert 'default=Path(__file__).parent / "results"' not in text, script.name
    assert result_file.result_place("a", None) == ROOT / "benchmarks" / "results" / "a.json"
    assert result_file.result_place("a", None, quick=True) == ROOT / "build" / "bench" / "a.json"


@pytest.mark.parametrize(("dirty", "words"), [(True, "measured with uncommitted changes"), (False, "")])
def test_writing_a_result_from_a_changed_tree_says_so(tmp_path, monkeypatch, capsys, dirty, words):
    monkeypatch.setattr(result_file, "environment", lambda: {"git": {"commit": "c", "dirty": dirty}})
    result_file.write_results(tmp_path / "a.json", "a", [])
    err = capsys.readouterr().err
    assert words in err
    assert bool(err) == dirty
