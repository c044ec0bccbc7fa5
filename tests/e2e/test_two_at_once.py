"""Two commands on one folder at the same moment, in separate processes: nothing is shared, nothing is lost."""

import json
import re
import signal
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.folders import held_file, held_folder
from nanochat_cli.formats.run.checkpoints import latest_step
from tests.e2e.processes import run_together, start
from tests.e2e.tiny import TINY, write_corpus
from tests.rl.tiny_run import make_run, write_problems

RUN = [
    *TINY,
    *("--set", "data.path=data/src", "--set", "train.log_interval=1", "--set", "eval.interval=1000"),
    *("--set", "checkpoint.interval=2", "--set", "bigram_init.steps=0", "--set", "train.device=cpu"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a data set."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "src")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tokenize", "--source", "src", "--vocab-size", "300"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def logged_steps(run: Path) -> list[int]:
    return [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss/main" in line
    ]


def test_two_trainings_started_together_have_a_folder_each(folder):
    line = ["train", *RUN, "--set", "train.total_steps=4"]
    ended = run_together(folder, line, line)
    assert [code for code, _ in ended] == [0, 0], ended
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["quickstart-1", "quickstart-2"]
    for run in (folder / "runs").iterdir():
        assert logged_steps(run) == [1, 2, 3, 4]
        assert latest_step(run) == 4


@pytest.mark.slow
def test_the_second_of_two_trainings_with_one_name_ends_with_one_line(folder):
    line = ["train", *RUN, "--set", "train.total_steps=4", "--name", "same"]
    ended = run_together(folder, line, line)
    assert sorted(code for code, _ in ended) == [0, 2], ended
    (refused,) = (error for code, error in ended if code == 2)
    assert re.search(r"runs/same: (process \d+.* trains it; wait until|a run of that name exists)", refused)
    assert refused.count("error: ") == 1
    assert logged_steps(folder / "runs" / "same") == [1, 2, 3, 4]


def test_a_run_that_still_trains_is_not_resumed_exported_is_fine_and_a_killed_one_is_free(folder, capfd):
    with start(folder, "train", *RUN, "--set", "train.total_steps=1000000", "--name", "busy") as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("step 4/"))
        capfd.readouterr()
        assert main(["train", "--resume", "busy"]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert re.match(rf"error: runs/busy: process {process.pid} \(since .*\) trains it; wait until it ends", error)
        assert f"kill {process.pid}" in error
        assert main(["export", "busy", "--no-verify", "--type", "q2_0"]) == 0
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    step = latest_step(folder / "runs" / "busy")
    assert step is not None
    assert main(["train", "--resume", "busy", "--set", f"train.total_steps={step + 1}"]) == 0
    assert logged_steps(folder / "runs" / "busy") == list(range(1, step + 2))


@pytest.mark.slow
def test_two_exports_to_one_file_leave_a_whole_file_and_a_whole_report(folder):
    with start(folder, "train", *RUN, "--set", "train.total_steps=2", "--name", "exported") as process:
        assert process.wait() == 0
    lines = [["export", "exported", "--type", kind] for kind in ("q2_0", "f16")]
    ended = run_together(folder, *lines)
    assert {code for code, _ in ended} <= {0, 2}, ended
    assert any(code == 0 for code, _ in ended)
    for code, error in ended:
        assert code == 0 or re.search(r"model\.gguf: process \d+ \(since .*\) writes it", error)
    run = folder / "runs" / "exported"
    assert json.loads((run / "results.json").read_text())["verification"]
    assert not [path.name for path in run.iterdir() if "partial" in path.name or path.suffix in (".tmp", ".lock")]


def test_two_preparations_of_one_folder_make_it_once(folder):
    line = ["tokenize", "--source", "src", "--vocab-size", "300", "--out", "data/both"]
    ended = run_together(folder, line, line)
    assert [code for code, _ in ended] == [0, 0], ended
    assert sum("already prepared" in error for _, error in ended) == 1
    assert not (folder / "data" / "both" / ".lock").exists()


def test_a_preparation_that_fails_leaves_no_folder(folder):
    (folder / "one").mkdir()
    (folder / "one" / "only.py").write_text("x = 1\n")  # a document must be held out, and there is no other
    assert main(["tokenize", "--source", "one", "--out", "new/data"]) == 3
    assert not (folder / "new").exists()


@pytest.mark.slow
def test_only_one_of_two_suites_in_one_folder_runs(folder):
    sets = [word for text in RUN if "=" in text for word in ("--set", text)]
    line = ["bench", "ab", "--base", "quickstart", "--base", "cpu", *sets, "--set", "train.total_steps=2"]
    line += ["--vary", "optim.muon_momentum=0.8", "--seeds", "1", "--out", "suite"]
    ended = run_together(folder, line, line)
    assert sorted(code for code, _ in ended) == [0, 2], ended
    (refused,) = (error for code, error in ended if code == 2)
    assert re.search(r"error: suite: (process \d+ \(since .*\) runs the suite in it|a suite is here)", refused)


GRPO = ["grpo", "whole", "--task", "p.jsonl", "--rounds", "1", "--group", "2", "--mode", "training-free"]
GRPO += ["--set", "grpo.max_tokens=8", "--set", "grpo.eval_samples=1", "--set", "grpo.held_out=0.34"]
SUITE = ["bench", "ab", "--base", "quickstart", "--base", "cpu", "--vary", "optim.muon_momentum=0.8", "--seeds", "1"]
HELD = {
    "runs/held": ["train", *RUN, "--set", "train.total_steps=2", "--name", "held"],
    "runs/whole": ["train", "--resume", "whole", "--set", "train.total_steps=4"],
    "runs/practised": [*GRPO, "--out", "runs/practised"],
    "held.gguf": ["export", "whole", "--no-verify", "--type", "q2_0", "--out", "held.gguf"],
    "held-hf": ["export", "whole", "--no-verify", "--hf", "--out", "held-hf"],
    "held-suite": [*SUITE, "--set", "train.time_budget=none", "--out", "held-suite"],
}
"""A place, and a command that would write there."""


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The run `whole`, and problems to practise."""
    write_problems(folder / "p.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", *RUN, "--set", "train.total_steps=2", "--name", "whole"]) == 0
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", HELD)
def test_what_another_process_writes_is_left_alone_with_one_line(whole, capfd, place):
    hold = held_file if place.endswith(".gguf") else held_folder
    with hold(Path(place), "writes"):
        before = files(whole)
        capfd.readouterr()
        assert main(HELD[place]) == 2
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert re.search(
            rf"{re.escape(place)}: process \d+ \(since .*\) writes it; wait until it ends or stop", errors[0]
        )
        assert files(whole) == before


@pytest.mark.slow
def test_one_of_two_folders_of_hugging_face_and_of_two_runs_of_grpo_is_written(whole):
    for line, place in (
        (["export", "whole", "--hf", "--out", "both-hf"], "both-hf"),
        ([*GRPO, "--out", "runs/both"], "runs/both"),
    ):
        ended = run_together(whole, line, line)
        assert {code for code, _ in ended} <= {0, 2}, ended
        assert any(code == 0 for code, _ in ended)
        for code, error in ended:
            assert code == 0 or re.search(rf"{place}: (process \d+ .* it; wait until|a run of that name exists)", error)
            assert error.count("error: ") == (code != 0)
    assert main(["import", "both-hf", "--out", "runs/imported", "--no-verify"]) == 0
    assert (whole / "runs" / "both" / "report.md").is_file()


@pytest.mark.slow
def test_two_runs_of_grpo_share_a_library_without_losing_a_line(whole):
    make_run(whole / "runs")
    library = whole / "shared.jsonl"
    line = ["grpo", "source", *GRPO[2:], "--set", f"grpo.library={library}", "--set", "grpo.max_tokens=20"]
    ended = run_together(whole, [*line, "--out", "runs/one"], [*line, "--out", "runs/other"])
    assert [code for code, _ in ended] == [0, 0], ended
    rounds = [json.loads((whole / "runs" / name / "metrics.jsonl").read_text()) for name in ("one", "other")]
    added = sum(round_["library/added"] for round_ in rounds)
    assert added > 0
    assert len([json.loads(text) for text in library.read_text().splitlines()]) == added
