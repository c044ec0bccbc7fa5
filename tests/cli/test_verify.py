"""`nanochat verify`: what it says about whole and damaged exports and checkpoints, and with which exit code."""

import json
import shutil
from pathlib import Path

import pytest

from nanochat_cli.export import llama_cpp, transformers_parity
from tests.gguf_bytes import without_checksum

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written" / "runs" / "plain"
DATA, FAILED = 3, 4


@pytest.fixture
def run(folder, nanochat, monkeypatch):
    """A run with a GGUF file and a Hugging Face folder, which has a GGUF file too."""
    for other in (llama_cpp, transformers_parity):
        monkeypatch.setattr(other, "is_available", lambda: False)
    shutil.copytree(WRITTEN, folder / "runs" / "plain")
    assert nanochat("export", "plain", "--hf", "--gguf", "--no-verify").code == 0
    assert nanochat("export", "plain", "--no-verify").code == 0
    return folder / "runs" / "plain"


def flip(path, at=-100):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def states(outcome, folder):
    assert outcome.code in (0, FAILED), outcome.err
    findings = json.loads((folder / "found.json").read_text())["findings"]
    return {str(Path(one["path"]).relative_to("runs/plain")): one["state"] for one in findings}


def test_a_run_with_its_exports_is_whole_until_a_bit_changes(nanochat, folder, run):
    steps = {f"checkpoints/{path.name}" for path in run.glob("checkpoints/step-*")}
    everything = steps | {"model.gguf", "hf", "hf/model.gguf"}
    outcome = nanochat("verify", "plain", "--json", "found.json")
    assert states(outcome, folder) == dict.fromkeys(everything, "intact")
    assert outcome.code == 0
    flip(run / "hf/model.safetensors")
    flip(run / "model.gguf")
    flip(next(run.glob("checkpoints/step-*/model.safetensors")))
    outcome = nanochat("verify", "runs/plain", "--json", "found.json")
    assert outcome.code == FAILED
    found = states(outcome, folder)
    assert {name for name, state in found.items() if state == "damaged"} == {"hf", "model.gguf", min(steps)}
    assert "error: " in outcome.err.splitlines()[-1]


def test_without_a_path_it_is_the_latest_run(nanochat, folder, run):
    shutil.copytree(run, folder / "runs" / "later")
    flip(run / "model.gguf")
    assert nanochat("verify").code == 0
    flip(folder / "runs" / "later" / "model.gguf")
    assert "runs/later/model.gguf: not what was written" in nanochat("verify").err


def test_one_file_or_folder_is_looked_at_alone(nanochat, folder, run):
    flip(run / "model.gguf")
    assert nanochat("verify", "runs/plain/hf").code == 0
    assert nanochat("verify", "runs/plain/hf/model.gguf").code == 0
    outcome = nanochat("verify", "runs/plain/model.gguf")
    assert outcome.code == FAILED
    assert "runs/plain/model.gguf: not what was written; do not use it" in outcome.err


def test_what_carries_no_checksum_is_named_and_is_no_failure(nanochat, run):
    (run / "hf/checksums.json").unlink()
    file = run / "hf/model.gguf"
    file.write_bytes(without_checksum(file.read_bytes()))
    outcome = nanochat("verify", "runs/plain/hf")
    assert outcome.code == 0
    for name, lacks in (("hf", "checksums.json"), ("hf/model.gguf", "nanochat.tensors.sha256")):
        assert f"warning: runs/plain/{name}: cannot tell: it has no {lacks}" in outcome.err


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("missing.gguf", "missing.gguf: no such file"),
        ("missing", "missing: no such run"),
        ("text.txt", "text.txt is not a GGUF file"),
        ("empty", "empty: not a run of nanochat train"),
    ],
)
def test_what_cannot_be_looked_at_is_one_line(nanochat, folder, target, message):
    (folder / "text.txt").write_text("hello, hello")
    (folder / "empty").mkdir()
    outcome = nanochat("verify", target)
    assert outcome.code == DATA
    assert message in outcome.error


def test_a_run_without_anything_saved_is_one_line(nanochat, folder):
    (folder / "runs/new").mkdir(parents=True)
    (folder / "runs/new/config.toml").write_text("")
    outcome = nanochat("verify", "new")
    assert (outcome.code, outcome.error) == (DATA, "new: nothing is saved in it yet")
