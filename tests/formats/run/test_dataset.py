"""A run and its data set: what was recorded when it began is compared whenever they meet again.

The oracle of a figure is the same figure, measured before anything changed.
"""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tomlkit

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config
from tests.e2e.tiny import TINY, write_corpus

TRAIN = ["train", *TINY, "--set", "train.total_steps=2", "--set", "bigram_init.steps=0", "--set", "train.device=cpu"]
TOKENIZE = ["tokenize", "--source", "src", "--vocab-size", "300", "--out", "data"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, its data set, a run `shards` on it and a run `text` on the corpus itself."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder / "src", 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("NANOCHAT_CACHE", str(folder / "cache"))
        assert main(TOKENIZE) == 0
        assert main([*TRAIN, "--name", "shards", "--set", "data.path=data"]) == 0
        assert main([*TRAIN, "--name", "text", "--set", "data.source=src"]) == 0
    return folder


@pytest.fixture
def folder(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in its original state; tests change it in place, since the runs have recorded its path."""
    backup = prepared.with_name("backup")
    if not backup.exists():
        shutil.copytree(prepared, backup)
    shutil.rmtree(prepared)
    shutil.copytree(backup, prepared)
    monkeypatch.chdir(prepared)
    monkeypatch.setenv("NANOCHAT_CACHE", str(prepared / "cache"))
    return prepared


def figure(*line: str) -> float:
    """Bits per byte that `nanochat eval LINE` measures."""
    assert main(["eval", *line, "--json", "eval.json"]) == 0
    return json.loads(Path("eval.json").read_text())["bits_per_byte"]


def refusal(capfd: pytest.CaptureFixture[str], code: int, *line: str) -> str:
    """The one line of error with which a command ends."""
    capfd.readouterr()
    assert main(list(line)) == code
    out, err = capfd.readouterr()
    assert out == ""
    errors = [text for text in err.splitlines() if text.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_nothing_is_measured_on_a_folder_with_another_tokenizer(folder, capfd):
    write_corpus(folder / "other", 30)
    (folder / "other" / "more.py").write_text("class Completely:\n    different = 'text'\n" * 50)
    assert main(["tokenize", "--source", "other", "--vocab-size", "300", "--out", "data", "--force"]) == 0
    commands = {
        "eval": ["eval", "shards"],
        "suite": ["eval", "shards", "--suite", "bpb"],
        "score": ["score", "shards"],
        "resume": ["train", "--resume", "shards", "--set", "train.total_steps=3"],
        "reference": [
            *TRAIN, "--name", "new", "--set", "data.path=data", "--set", "collider.enabled=true",
            "--set", "collider.score=excess", "--set", "collider.reference=runs/shards",
        ],
    }  # fmt: skip
    for command, line in commands.items():
        message = refusal(capfd, 3, *line)
        assert re.search(r"data has a different tokenizer from \S*runs/shards/tokenizer\.json", message), command
    assert not (folder / "runs" / "new").exists()
    assert not (folder / "runs" / "shards" / "scores.safetensors").exists()
    assert figure("shards", "--data", "data") > 0  # in the tokens of the run, because --data asks for it


def test_nothing_is_measured_on_other_held_out_documents_in_the_same_tokens(folder, capfd):
    (folder / "src" / "another.py").write_text("y = 1\n" * 20)
    tokenizer = ["--tokenizer", "runs/shards/tokenizer.json", "--force", "--set", "data.val_fraction=0.3"]
    assert main([*TOKENIZE, *tokenizer]) == 0
    assert "its held-out documents are not those that runs/shards began with" in refusal(capfd, 3, "eval", "shards")
    assert "its training documents are not those" in refusal(capfd, 3, "score", "shards")
    line = ["train", "--resume", "shards", "--set", "train.total_steps=3"]
    assert "continue on another data set of the same tokenizer: --set data.path=DIR" in refusal(capfd, 3, *line)
    assert main([*TOKENIZE, *tokenizer, "--out", "elsewhere"]) == 0
    assert main([*line, "--set", "data.path=elsewhere"]) == 0
    assert figure("shards") > 0  # it belongs to the new data set now


def test_an_additional_file_in_the_source_changes_no_figure_of_a_run(folder, capfd):
    before = figure("text")
    (folder / "src" / "another.py").write_text("def another():\n    return 'something else'\n" * 20)
    assert figure("text") == before
    assert main(["train", "--resume", "text", "--set", "train.total_steps=3"]) == 0
    shutil.rmtree(folder / "cache")
    assert "a different tokenizer" in refusal(capfd, 3, "eval", "text")


def test_a_run_is_measured_and_resumed_from_any_folder(folder, tmp_path, monkeypatch):
    before = figure("shards")
    monkeypatch.chdir(tmp_path)
    assert figure(str(folder / "runs" / "shards")) == before
    assert main(["eval", str(folder / "runs" / "shards"), "--suite", "bpb", "--json", "bpb.json"]) == 0
    assert json.loads(Path("bpb.json").read_text())["languages"].keys() == {"python"}  # read from the source again
    assert main(["train", "--resume", str(folder / "runs" / "text"), "--set", "train.total_steps=3"]) == 0


def test_an_old_run_with_a_relative_path_is_found_and_reported_as_unchecked(folder, tmp_path, monkeypatch, capfd):
    before = figure("shards")
    run = folder / "runs" / "shards"
    config = tomlkit.parse((run / "config.toml").read_text())
    config["data"]["path"] = "data"  # pyright: ignore[reportIndexIssue]
    (run / "config.toml").write_text(tomlkit.dumps(config))
    (run / "dataset.json").unlink()
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    assert figure(str(run)) == before
    assert "did not record its data" in capfd.readouterr().err


def test_a_run_that_was_moved_with_its_data_is_measured_where_it_is(folder, tmp_path):
    before = figure("shards")
    shutil.copytree(folder, tmp_path / "moved")
    shutil.rmtree(folder / "data")
    assert figure(str(tmp_path / "moved" / "runs" / "shards")) == before


def test_a_run_keeps_absolute_paths(folder):
    assert load_run_config(folder / "runs" / "shards").data.path == folder / "data"
    assert load_run_config(folder / "runs" / "text").data.source == str(folder / "src")


def test_a_data_set_that_runs_use_is_replaced_only_with_force(folder, capfd):
    before = {path.name: path.read_bytes() for path in (folder / "data").iterdir()}
    (folder / "src" / "another.py").write_text("y = 1\n" * 20)
    for change, line in {"the source": TOKENIZE, "model.vocab_size": [*TOKENIZE, "--vocab-size", "310"]}.items():
        message = refusal(capfd, 2, *line)
        assert f"data: another data set is here ({change} changed)" in message
        assert "--force: runs/shards could no longer be measured" in message
        assert {path.name: path.read_bytes() for path in (folder / "data").iterdir()} == before
    assert main([*TOKENIZE, "--force"]) == 0
    assert {path.name: path.read_bytes() for path in (folder / "data").iterdir()} != before


def test_the_same_command_on_touched_files_replaces_nothing(folder, capfd):
    before = figure("shards")
    shards = {path: path.stat().st_ino for path in (folder / "data").glob("*.safetensors")}
    for path in (folder / "src").iterdir():
        os.utime(path, (1, 1))
    capfd.readouterr()
    assert main(TOKENIZE) == 0
    assert "already prepared" in capfd.readouterr().err
    assert {path: path.stat().st_ino for path in (folder / "data").glob("*.safetensors")} == shards
    assert figure("shards") == before
