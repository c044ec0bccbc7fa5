"""`nanochat validate`: what it says, which stages run after a failure, and how it ends."""

import json
import math
import re
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.diagnose.validate import stages, three_way_parity
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase
from nanochat_cli.diagnose.validate.stage import Figure, NotHere, Stage, Value, Workspace
from nanochat_cli.diagnose.validate.stages import STAGES, report, require_no_failure, run_stages
from nanochat_cli.errors import Interrupted, ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.report.reporter import PlainReporter


def test_every_stage_passes_here_and_reports_a_time_and_figures(chain):
    assert chain.code == 0, chain.found
    assert chain.found["valid"] is True
    assert [stage["name"] for stage in chain.found["stages"]] == list(STAGES)
    for stage in chain.found["stages"]:
        absent = stage["name"] == "llama.cpp" and not llama_cpp.is_available()
        assert stage["verdict"] == ("not here" if absent else "passed"), stage
        assert absent or stage["seconds"] > 0
        assert absent or re.search(r"\d", stage["measured"]), stage


def test_the_result_file_has_the_form_of_all_of_them(chain):
    assert chain.found["suite"] == "validate"
    assert chain.found["environment"]["versions"]["torch"]
    for result in chain.found["results"]:
        assert result.keys() >= {"case", "metric", "value", "unit", "peer", "ratio", "runs", "spread"}
        assert math.isfinite(result["value"])
    measured = {result["case"] for result in chain.found["results"] if result["metric"] != "time"}
    assert measured == chain.place.passed


def test_every_corner_of_the_kernels_is_reported(chain):
    (kernels,) = [stage for stage in chain.found["stages"] if stage["name"] == "kernels"]
    assert kernels["details"].keys() == set(three_way_parity.CORNERS)
    assert {corner["verdict"] for corner in kernels["details"].values()} <= {"equal", "absent"}
    assert kernels["details"]["cpu"]["comparisons"] > 0


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Stage]:
    """Replaces the real stages: a chain of three, each needing the one before it, and one alone."""

    def fine(workspace: Workspace) -> Figure:
        return Figure("max |difference| 0", [Value("largest difference", 0.0, "1")])

    table = {
        "first": Stage("first", fine, left_out="half"),
        "second": Stage("second", fine, needs=("first",)),
        "third": Stage("third", fine, needs=("second",)),
        "alone": Stage("alone", fine),
    }
    monkeypatch.setattr(stages, "STAGES", table)
    return table


def failing(error: BaseException):
    def check(workspace: Workspace) -> Figure:
        raise error

    return check


def test_after_a_failure_every_stage_that_does_not_need_it_still_runs(three, tmp_path):
    three["first"] = Stage("first", failing(ValidationFailure("the sum is 2")))
    outcomes = run_stages(tuple(three), Workspace(tmp_path))
    assert [outcome.verdict for outcome in outcomes] == ["failed", "not run", "not run", "passed"]
    assert [outcome.text for outcome in outcomes[:3]] == [
        "the sum is 2",
        "not run: needs first",
        "not run: needs second",
    ]
    with pytest.raises(ValidationFailure, match=r"^first: the sum is 2$"):
        require_no_failure(outcomes)


def test_an_internal_error_fails_only_its_stage(three, tmp_path):
    three["alone"] = Stage("alone", failing(KeyError("weight")))
    outcomes = run_stages(tuple(three), Workspace(tmp_path))
    assert [outcome.verdict for outcome in outcomes] == ["passed", "passed", "passed", "failed"]
    assert outcomes[-1].text == "KeyError: 'weight'"


def test_what_is_not_installed_fails_nothing(three, tmp_path):
    three["alone"] = Stage("alone", failing(NotHere("install nanochat-ternary[x]")))
    outcomes = run_stages(tuple(three), Workspace(tmp_path))
    assert (outcomes[-1].verdict, outcomes[-1].text) == ("not here", "not here: install nanochat-ternary[x]")
    require_no_failure(outcomes)


@pytest.mark.parametrize("error", [Interrupted("stopped by SIGINT"), KeyboardInterrupt()], ids=["saved", "at once"])
def test_an_interruption_ends_the_command(three, tmp_path, error):
    three["first"] = Stage("first", failing(error))
    with pytest.raises(type(error)):
        run_stages(tuple(three), Workspace(tmp_path))


def test_the_command_ends_with_4_names_the_stage_and_writes_its_result(three, tmp_path, capfd):
    three["second"] = Stage("second", failing(ValidationFailure("two\nlines")))
    assert main(["validate", "--json", str(tmp_path / "found.json")]) == 4
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == "error: second: two lines"
    assert [line.split("  ")[0] for line in captured.out.splitlines()[2:]] == list(three)
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["valid"], found["exit_code"]) == (False, 4)
    assert found["failures"] == ["second: two\nlines"]


def test_each_stage_is_announced_before_it_runs_and_quick_says_what_it_leaves_out(three, tmp_path, capfd):
    reporter = PlainReporter()
    place = Workspace(tmp_path, quick=True, reporter=reporter)
    report(run_stages(tuple(three), place), reporter, quick=True)
    err = capfd.readouterr().err.splitlines()
    assert err[:4] == ["1/4 first …", "2/4 second …", "3/4 third …", "4/4 alone …"]
    assert err[4] == "--quick left out: first: half"


def test_a_machine_without_llama_cpp_is_told_how_to_get_it(place, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    (outcome,) = run_stages(["llama.cpp"], place)
    assert (outcome.verdict, outcome.text) == ("not here", "not here: install nanochat-ternary[llama-cpp]")


def test_the_full_form_takes_more_kernels_and_every_type_of_file(place, monkeypatch):
    place.quick = False
    monkeypatch.setattr(three_way_parity, "quick_cases", lambda: [MatmulCase(17, 128, 1)])
    kernels, gguf = run_stages(["kernels", "gguf"], place)
    assert kernels.figure is not None
    assert kernels.figure.details["cpu"]["cases"] == 1
    assert gguf.text.startswith("tq2_0, tq1_0, q2_0, q4_0, f16, f32: ")


def test_nothing_is_left_behind(three, tmp_path, monkeypatch):
    seen: list[Path] = []

    def look(workspace: Workspace) -> Figure:
        (workspace.folder / "file").write_text("x")
        seen.append(workspace.folder)
        return Figure("1 file", [])

    three["first"] = Stage("first", look)
    monkeypatch.chdir(tmp_path)
    assert main(["validate", "--quiet"]) == 0
    assert not seen[0].exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_full_command_passes_in_less_than_a_minute(tmp_path):
    assert main(["validate", "--quiet", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    (seconds,) = [r["value"] for r in found["results"] if r["case"] == "all stages"]
    assert seconds < 60
