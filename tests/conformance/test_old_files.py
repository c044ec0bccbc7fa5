"""What an older version wrote still loads and means the same: runs, data, GGUF files, experiences, suites, scores.

`tests/fixtures/written` is a working folder as commit d6f3346 left it (see `tests/fixtures/write.py`), here moved to
another place as a whole. The oracle is what that version itself computed from its files.

Tolerances: another machine adds floats in another order, which leaves 1e-6; where an activation then falls to the other
side of an int8 rounding tie, the logits behind it move by one of 127 steps, which is far below the margin of the greedy
tokens that were kept. So of two positions one agrees closely, and neither is far off.
"""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import nanochat_cli
from nanochat_cli.cli.app import main
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.formats.open import open_run
from nanochat_cli.formats.run import checkpoints
from tests.training.test_all_methods import flatten

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
CLOSE, AT_A_TIE = 1e-4, 0.1
NAMES_PATHS = "*.toml", "dataset.json", "data.json"
"""Files with absolute paths. Checkpoints have some too, sealed by a hash, and nothing of a run hangs on those."""

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working folder, whose paths are those of the copy; nobody writes into it."""
    folder = shutil.copytree(FIXTURES / "written", tmp_path_factory.mktemp("moved") / "work")
    for file in (file for pattern in NAMES_PATHS for file in folder.rglob(pattern)):
        file.write_text(file.read_text().replace(EXPECTED["at"], str(folder)))
    return folder


@pytest.fixture
def nanochat(moved: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """A command line in the working folder that has to succeed; what it found."""
    monkeypatch.chdir(moved)

    def run(*line: object) -> dict[str, Any]:
        code = main([*map(str, line), "--json", str(tmp_path / "found.json")])
        assert code == 0, capfd.readouterr().err
        return json.loads((tmp_path / "found.json").read_text())

    return run


def copy_of(run: Path, folder: Path) -> Path:
    return shutil.copytree(run, folder / run.name)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss/main"] for line in lines if "loss/main" in line]


@pytest.mark.parametrize("target", EXPECTED["answers"])
def test_a_model_computes_and_answers_what_it_did(moved: Path, target: str) -> None:
    model, then = nanochat_cli.load(moved / target), EXPECTED["answers"][target]
    assert model.tokenizer.encode(then["prompt"] + then["text"]) == then["ids"]
    with torch.no_grad():
        logits = model.network.logits(model.network(torch.tensor([then["ids"]])))[0, -2:]
    differences = (logits - load_file(FIXTURES / "logits.safetensors")[target]).abs().amax(dim=-1)
    assert differences.min() <= CLOSE
    assert differences.max() <= AT_A_TIE
    assert model.generate(then["prompt"], max_tokens=8, temperature=0) == then["text"]


@pytest.mark.parametrize("name", ["gated", "hybrid"])
def test_the_drafts_of_a_run_are_there_and_change_no_greedy_text(nanochat: Run, moved: Path, name: str) -> None:
    assert open_run(moved / "runs" / name).mtp() is not None
    then = EXPECTED["answers"][f"runs/{name}"]
    line = "-p", then["prompt"], "--max-tokens", 8, "--temperature", 0, "--speculate", 1
    assert nanochat("generate", f"runs/{name}", *line)["text"] == then["text"]


def test_a_data_set_is_read_and_is_what_its_source_makes(nanochat: Run, moved: Path) -> None:
    reader = ShardReader(moved / "data", verify="full")
    texts = {json.loads(line)["text"].encode() for line in (moved / "answers.jsonl").read_text().splitlines()}
    documents = [*reader.documents("train"), *reader.documents("val")]
    assert len(documents) == reader.manifest.train.documents + reader.manifest.val.documents == len(texts)
    assert set(documents) == texts
    assert {prompt: reader.tokenizer.encode(prompt) for prompt in EXPECTED["encoded"]} == EXPECTED["encoded"]
    before = {file.name: file.read_bytes() for file in (moved / "data").glob("*.safetensors")}
    same = [
        "--out",
        "data",
        "--vocab-size",
        272,
        "--set",
        "data.dedup=none",
    ]  # it had no such key, and left out nothing
    nanochat("tokenize", "--source", "answers.jsonl", *same)
    assert {file.name: file.read_bytes() for file in (moved / "data").glob("*.safetensors")} == before


@pytest.mark.parametrize("name", EXPECTED["losses"])
def test_a_run_goes_on_as_it_would_have_and_twice_the_same(
    nanochat: Run, moved: Path, tmp_path: Path, name: str
) -> None:
    """Losses of the steps behind the checkpoint: the last one follows from the optimizer's state too."""
    runs = [copy_of(moved / "runs" / name, tmp_path / part) for part in ("one", "other")]
    for run in runs:
        nanochat("train", "--resume", run, "--set", "train.total_steps=8")
    one, other = (checkpoints.load(run) for run in runs)
    tensors = [flatten(checkpoint.tensors) for checkpoint in (one, other)]
    assert one.step == other.step == 8
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert losses(runs[0]) == losses(runs[1])
    assert losses(runs[0])[6:] == pytest.approx(EXPECTED["losses"][name], rel=1e-3)


@pytest.mark.parametrize("name", ["plain", "bitnet", "hybrid", "moe-bias", "mhc-static"])
def test_a_run_is_exported_and_the_file_verified(nanochat: Run, moved: Path, tmp_path: Path, name: str) -> None:
    found = nanochat("export", copy_of(moved / "runs" / name, tmp_path), "--out", tmp_path / "model.gguf")
    assert found["verify"]["reload_difference"] <= CLOSE


def test_policy_grpo_goes_on(nanochat: Run, moved: Path, tmp_path: Path) -> None:
    run = copy_of(moved / "runs" / "policy", tmp_path)
    updates = checkpoints.load(run).state["grpo"]["learner"]["updates"]
    nanochat("grpo", "--resume", run, "--rounds", 3)
    state = checkpoints.load(run)
    assert state.step == 3
    assert state.state["grpo"]["learner"]["updates"] > updates > 0
    assert all(tensor.isfinite().all() for tensor in flatten(state.tensors["model"]).values())


def test_experiences_are_kept_and_joined_by_new_ones(nanochat: Run, moved: Path, tmp_path: Path) -> None:
    run = copy_of(moved / "runs" / "training-free", tmp_path)
    before = (run / "experiences.jsonl").read_text().splitlines()
    assert before
    nanochat("grpo", "--resume", run, "--rounds", 3)
    after = (run / "experiences.jsonl").read_text().splitlines()
    assert {line: json.loads(line) for line in before}.items() <= {line: json.loads(line) for line in after}.items()


def test_a_suite_goes_on_with_the_run_that_is_missing(nanochat: Run, moved: Path, tmp_path: Path) -> None:
    suite = shutil.copytree(moved / "suite", tmp_path / "suite")
    for file in suite.rglob("*.toml"):
        file.write_text(file.read_text().replace(str(moved / "suite"), str(suite)))
    then = {run["config"]: run for run in json.loads((suite / "report.json").read_text())["runs"]}
    (missing,) = (name for name in then if name != "base")
    shutil.rmtree(suite / then[missing]["run"])
    (suite / "outcomes" / f"{Path(then[missing]['run']).name}.json").unlink()
    nanochat("bench", "ab", "--resume", "--out", suite)
    now = {run["config"]: run for run in json.loads((suite / "report.json").read_text())["runs"]}
    assert now["base"] == then["base"]
    assert now[missing]["status"] == "finished"
    bits = now[missing]["measures"]["bits_per_byte"]
    assert bits == pytest.approx(then[missing]["measures"]["bits_per_byte"], rel=1e-2)


def test_runs_are_compared_and_measured(nanochat: Run, tmp_path: Path) -> None:
    nanochat("bench", "compare", "runs/plain", "runs/mhc", "--out", tmp_path / "compared")
    report = json.loads((tmp_path / "compared" / "report.json").read_text())
    assert [run["status"] for run in report["runs"]] == ["finished", "finished"]
    assert math.isfinite(nanochat("eval", "runs/gum")["bits_per_byte"])


def test_every_file_is_of_the_version_that_is_named() -> None:
    files = sorted((FIXTURES / "written" / "runs").glob("*/environment.json"))
    commits = {json.loads(file.read_text())["git"]["commit"] for file in files}
    assert len(files) == 15
    assert commits == {EXPECTED["commit"]}
    assert EXPECTED["commit"].startswith("d6f3346")
