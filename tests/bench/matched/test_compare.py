"""`nanochat bench compare` on two runs that were really trained, and on changed copies of them."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_cli.bench.matched.compare import compare_runs
from nanochat_cli.bench.matched.run_record import Suite
from nanochat_cli.cli.app import main
from nanochat_cli.config.load import config_to_toml, resolve_config
from nanochat_cli.errors import DataError
from tests.bench.matched.suites import read_suite
from tests.docs.markdown import tables
from tests.e2e.tiny import TINY, write_corpus

Copy = Callable[..., Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the runs `plain` and `mtp`, which differ in MTP and one learning rate."""
    folder = tmp_path_factory.mktemp("work")
    write_corpus(folder / "src")
    line = ["train", *TINY, "--quiet", "--set", "data.source=src", "--set", "train.total_steps=6"]
    line += ["--set", "train.log_interval=1", "--set", "eval.interval=3", "--set", "bigram_init.steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NANOCHAT_CACHE", str(folder / "cache"))
        for name, extra in (("plain", []), ("mtp", ["--set", "mtp.enabled=true", "--set", "optim.head_lr=0.1"])):
            assert main([*line, *extra, "--name", name]) == 0
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate working folder with copies of both runs, without their checkpoints."""
    shutil.copytree(trained / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copy(work: Path) -> Copy:
    """`copy("plain", "second", "run.seed=2")`: a run under another name with other settings."""

    def make(source: str, name: str, *overrides: str) -> Path:
        folder = work / "runs" / name
        shutil.copytree(work / "runs" / source, folder)
        config = resolve_config(file=folder / "config.toml", overrides=[f"run.name={folder.name}", *overrides])
        (folder / "config.toml").write_text(config_to_toml(config))
        return folder

    return make


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


def groups(suite: Suite) -> dict[str, list[int]]:
    return {config: [run.seed for run in suite.of(config)] for config in suite.configs}


def test_the_report_of_two_runs_has_their_own_figures(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "compare", "plain", "mtp", "--json", "said.json"]) == 0
    said = capsys.readouterr()
    folder = Path("comparisons/compare-1")
    own = {name: json.loads((work / "runs" / name / "results.json").read_text()) for name in ("plain", "mtp")}
    found = {t.header[0]: t for t in reversed(tables((folder / "REPORT.md").read_text()))}
    rows = {row[0]: dict(zip(found["configuration"].header, row, strict=True)) for row in found["configuration"].rows}
    assert list(rows) == ["plain", "mtp"]
    for name, row in rows.items():
        assert row["bits per byte"] == f"{own[name]['results']['bits_per_byte']:.4f}"
        assert row["status"] == "finished"
    difference = own["mtp"]["results"]["bits_per_byte"] - own["plain"]["results"]["bits_per_byte"]
    assert abs(difference) > 1e-3  # otherwise rounding would decide its sign
    assert float(rows["mtp"]["− baseline"].replace("−", "-")) == pytest.approx(difference, abs=5.1e-5)
    assert found["key"].rows == [["optim.head_lr", "0.0005", "0.1"], ["mtp.enabled", "false", "true"]]
    suite = read_suite(folder)
    for run in suite.runs:
        results = own[run.config]["results"]
        assert run.measures["loss"] == results["loss"]
        assert run.measures["optimizer_state_bytes"] == results["optimizer_state_bytes"]
        assert run.measures["steps"] == results["steps"] == 6
        assert run.parameters == own[run.config]["parameters"]["total"]
        assert [point.step for point in run.evaluations] == [3, 6]
        assert run.measures["step_ms"] is not None
    assert suite.settings["notes"] == []
    assert suite.environment == json.loads((work / "runs/plain/environment.json").read_text())
    assert re.search(r"^mtp +1 +\d\.\d{4}", said.out, re.MULTILINE)
    assert json.loads(Path("said.json").read_text())["report"] == str(folder)
    assert {path.name for path in folder.iterdir()} >= {
        "report.html",
        "report.json",
        "bits_per_byte_time.png",
        "hparams",
    }
    assert sorted(path.name for path in (folder / "hparams").iterdir()) == ["mtp-seed-1337", "plain-seed-1337"]


def test_a_second_report_gets_its_own_folder(work: Path) -> None:
    for _ in range(2):
        assert main(["bench", "compare", "plain", "mtp", "--quiet"]) == 0
    assert sorted(path.name for path in Path("comparisons").iterdir()) == ["compare-1", "compare-2"]
    assert main(["bench", "compare", "runs/plain", "mtp", "--quiet", "--out", "here", "--baseline", "mtp"]) == 0
    assert read_suite(work / "here").baseline == "mtp"


def test_runs_that_differ_in_seed_and_name_only_are_one_configuration(copy: Copy) -> None:
    copy("plain", "plain-2", "run.seed=2")
    copy("mtp", "mtp-2", "run.seed=2")
    suite = compare_runs(paths("plain", "mtp", "plain-2", "mtp-2"))
    assert groups(suite) == {"plain": [2, 1337], "mtp": [2, 1337]}
    assert [run.run for run in suite.of("mtp")] == ["runs/mtp-2", "runs/mtp"]
    assert suite.settings["notes"] == []


def test_a_repeat_with_the_same_seed_is_a_separate_configuration(copy: Copy) -> None:
    copy("plain", "again")
    assert groups(compare_runs(paths("plain", "again"))) == {"plain": [1337], "again": [1337]}


def test_another_value_is_another_configuration(copy: Copy) -> None:
    copy("plain", "faster", "run.seed=2", "optim.lr=0.03")
    assert groups(compare_runs(paths("plain", "faster"))) == {"plain": [1337], "faster": [2]}


def test_runs_with_one_name_are_called_by_their_paths(copy: Copy) -> None:
    copy("mtp", "elsewhere/plain")
    suite = compare_runs(paths("plain", "elsewhere/plain"), "elsewhere/plain")
    assert suite.configs == ["runs/elsewhere/plain", "runs/plain"]


def test_a_baseline_is_any_run_of_its_configuration(copy: Copy) -> None:
    copy("mtp", "mtp-2", "run.seed=2")
    assert compare_runs(paths("plain", "mtp", "mtp-2"), "mtp-2").baseline == "mtp"


def test_when_a_run_reached_the_baseline_is_read_off_its_evaluations(work: Path) -> None:
    runs = {run.config: run for run in compare_runs(paths("plain", "mtp")).runs}
    plain, mtp = runs["plain"], runs["mtp"]
    assert plain.measures["tokens_to_baseline"] == plain.evaluations[-1].tokens  # its own end
    reached = mtp.evaluations[-1].bits_per_byte <= plain.evaluations[-1].bits_per_byte
    assert (mtp.measures["tokens_to_baseline"] is not None) == reached


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_other_held_out_documents_are_noted_and_figures_that_depend_on_them_left_out(copy: Copy) -> None:
    other = copy("plain", "other")
    results = json.loads((other / "results.json").read_text())
    results["baselines"]["gzip -9"] = 9.5
    (other / "results.json").write_text(json.dumps(results))
    suite = compare_runs(paths("plain", "other"))
    assert "runs/other: other held-out documents than runs/plain (gzip -9 makes 9.5000" in suite.settings["notes"][0]
    assert all(run.measures["tokens_to_baseline"] is None for run in suite.runs)
    assert all(run.measures["bits_per_byte"] is not None for run in suite.runs)


def test_without_compressors_documents_are_compared_by_their_source(copy: Copy) -> None:
    other = copy("plain", "other", "data.source=elsewhere")
    assert compare_runs(paths("plain", "other")).settings["notes"] == []  # the same ones, in another place
    (other / "results.json").unlink()
    assert "the [data] sections differ" in compare_runs(paths("plain", "other")).settings["notes"][0]


def test_another_tokenizer_device_or_part_is_noted(copy: Copy) -> None:
    other = copy("plain", "other", "eval.final_max_tokens=100")
    change(other / "tokenizer.json", "{", "{ ")
    environment = json.loads((other / "environment.json").read_text())
    (other / "environment.json").write_text(json.dumps(environment | {"device": "a GPU"}))
    notes = compare_runs(paths("plain", "other")).settings["notes"]
    for words in ("another tokenizer", "another eval.final_max_tokens", "another device", "reached the baseline"):
        assert any(words in note for note in notes), words


def test_seeds_without_a_partner_are_noted_in_the_report(copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    copy("mtp", "mtp-2", "run.seed=2")
    assert main(["bench", "compare", "plain", "mtp-2"]) == 0
    assert "mtp-2: no seed in common with plain" in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_named_with_its_step(copy: Copy) -> None:
    cut = copy("plain", "cut") / "metrics.jsonl"
    cut.write_text("".join(line for line in cut.read_text().splitlines(keepends=True) if '"final/' not in line))
    with pytest.raises(DataError, match=r"^runs/cut: not finished \(step 6 of at most 6, without a checkpoint\)"):
        compare_runs(paths("plain", "cut"))
    cut.unlink()  # as a run that Ctrl-C saved before anything was logged
    saved = cut.with_name("checkpoints")
    (saved / "step-000004").mkdir(parents=True)
    (saved / "latest").write_text("step-000004\n")
    with pytest.raises(DataError, match=r"not finished \(saved at step 4 of at most 6\); .*--resume runs/cut"):
        compare_runs(paths("plain", "cut"))


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (["plain"], 2, "a comparison needs two runs or more"),
        (["plain", "runs/plain"], 2, "runs/plain: this run is named twice"),
        (["plain", "nowhere"], 3, "nowhere: no such run"),
        (["plain", "runs"], 3, "runs: not a run of nanochat train"),
        (
            ["plain", "mtp", "--baseline", "best"],
            2,
            "--baseline best is not one of the compared runs: choose one of plain, mtp",
        ),
        (["plain", "mtp", "--out", "runs/plain/config.toml"], 3, "cannot write"),
    ],
)
def test_a_mistake_is_one_line(
    work: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, says: str
) -> None:
    assert main(["bench", "compare", *line]) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("comparisons").exists()


def test_comparing_needs_no_torch(work: Path) -> None:
    code = (
        "import sys; from nanochat_cli.cli.app import main\n"
        "assert main(['bench', 'compare', 'plain', 'mtp', '--quiet']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
