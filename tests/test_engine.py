"""The commands on a tiny corpus, one after another: what each leaves on disk and says."""

import json
from pathlib import Path

import pytest
import torch

import nanochat_cli as nanochat
from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config
from nanochat_cli.formats.open import load_run
from nanochat_cli.formats.run.checkpoints import latest_step

TINY = [
    *("--preset", "quickstart", "--preset", "cpu", "--set", "model.vocab_size=300", "--set", "model.n_layers=1"),
    *("--set", "model.ffn_dim=256", "--set", "train.time_budget=none", "--set", "train.seq_len=32"),
    *("--set", "train.batch_size=2", "--set", "telemetry.tensorboard=false"),
    *("--set", "train.backward=exact", "--set", "train.attention=torch", "--set", "optim.muon_format=fp32"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a corpus of sixty small files, made into a data set."""
    folder = tmp_path_factory.mktemp("work")
    source = folder / "src"
    source.mkdir()
    for number in range(60):
        (source / f"f{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["tokenize", "--source", "src", "--vocab-size", "300", "--json", "tokenize.json"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of three steps on that data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = ["train", *TINY, "--set", "data.path=data/src", "--name", "tiny", "--set", "train.total_steps=3"]
        assert main([*line, "--json", "train.json"]) == 0
    return folder / "runs" / "tiny"


@pytest.fixture(autouse=True)
def _inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def result(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_tokenize_reports_what_it_made(folder):
    found = result(folder, "tokenize.json")
    assert found["dataset"] == "data/src"
    assert found["train"]["documents"] + found["val"]["documents"] == 60
    sizes = sum(path.stat().st_size for path in (folder / "src").iterdir())
    assert found["train"]["bytes"] + found["val"]["bytes"] == sizes


def test_a_run_holds_what_is_needed_to_repeat_it(folder, run):
    config = load_run_config(run)
    assert (config.run.name, config.train.total_steps, config.model.n_layers) == ("tiny", 3, 1)
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"]
    assert (run / "tokenizer.json").read_bytes() == (folder / "data/src/tokenizer.json").read_bytes()
    assert latest_step(run) == 3


def test_train_says_first_where_its_file_will_run(folder, capfd):
    more = ["data.path=data/src", "train.total_steps=1", "eval.max_tokens=64", "bigram_init.steps=0", "mhc_n_streams=2"]
    line = ["train", *TINY, *(word for setting in more for word in ("--set", setting)), "--set", "train.compile=off"]
    assert main([*line, "--name", "streams", "--set", "run.dir=elsewhere"]) == 0
    said = capfd.readouterr().err
    architecture = "GGUF architecture nanochat-ternary; runs in llama.cpp: no: it has 2 residual streams"
    assert 0 <= said.index(architecture) < said.index("step 1/1")


def test_train_and_eval_agree_on_the_held_out_documents(folder, run):
    trained = result(folder, "train.json")["held_out"]
    assert main(["eval", "tiny", "--json", "eval.json"]) == 0
    measured = result(folder, "eval.json")
    assert measured["tokens"] == trained["tokens"]
    assert measured["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)


def test_generation_from_the_run_and_from_its_export_is_the_same(folder, run, capfd):
    assert main(["export", "tiny", "--gguf", "--type", "tq2_0", "--head", "f32", "--no-verify"]) == 0
    capfd.readouterr()
    texts = []
    for target in ("runs/tiny", "runs/tiny/model.gguf"):
        assert main(["generate", target, "-p", "def f", "--temperature", "0", "--max-tokens", "8", "--quiet"]) == 0
        texts.append(capfd.readouterr().out)
    assert texts[0].startswith("def f")
    assert texts[0] == texts[1]


def test_a_prompt_that_does_not_fit_is_not_written_before_the_error(run, capfd):
    assert main(["generate", "runs/tiny", "-p", "x " * 500]) == 3
    said = capfd.readouterr()
    assert said.out == ""
    assert "shorten the prompt" in said.err


def test_a_run_is_inspected_layer_by_layer_and_its_matrices_against_the_whole_singular_value_decomposition(folder, run):
    assert main(["inspect", "runs/tiny", "--json", "inspect.json"]) == 0
    assert main(["inspect", "runs/tiny", "--isometry", "--json", "isometry.json"]) == 0
    layers, matrices = result(folder, "inspect.json")["layers"], result(folder, "isometry.json")["isometry"]
    assert [layer["name"] for layer in layers] == [matrix["name"] for matrix in matrices]
    weights = load_run(run)[0].state_dict()
    for matrix in matrices:
        values = torch.linalg.svd(weights[f"{matrix['name']}.weight"].double()).S
        assert matrix["condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
        share = values.square().sum() ** 2 / values.pow(4).sum() / len(values)
        assert matrix["effective_rank"] == pytest.approx(float(share), rel=1e-6)
    for name in ("ternary.png", "isometry.png"):
        assert (run / "inspect" / name).read_bytes().startswith(b"\x89PNG")


def test_streams_of_a_plain_residual_are_refused(run, capfd):
    assert main(["inspect", "runs/tiny", "--mhc"]) == 2
    assert "model.mhc.streams = 1" in capfd.readouterr().err


def test_resuming_with_more_steps_is_remembered(run):
    assert main(["train", "--resume", "tiny", "--set", "train.total_steps=4"]) == 0
    assert latest_step(run) == 4
    assert load_run_config(run).train.total_steps == 4


def test_resuming_as_another_model_is_refused_and_changes_nothing(run, capfd):
    before = (run / "config.toml").read_bytes()
    assert main(["train", "--resume", "tiny", "--set", "model.n_layers=2"]) in (2, 3)
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: ")
    assert (run / "config.toml").read_bytes() == before


def test_a_data_set_of_another_vocabulary_is_refused(capfd):
    line = ["train", *TINY, "--set", "data.path=data/src", "--set", "model.vocab_size=512", "--name", "other"]
    assert main(line) == 3
    assert "model.vocab_size = 512" in capfd.readouterr().err
    assert not Path("runs/other").exists()


@pytest.mark.slow
def test_python_trains_resumes_evaluates_and_exports_as_the_commands_do(folder, run):
    pairs = [text.partition("=")[::2] for text in TINY if "=" in text]
    overrides = {key: int(value) if value.isdigit() else value for key, value in pairs}
    overrides |= {"train.time_budget": None, "telemetry.tensorboard": False, "data.path": Path("data/src")}
    presets = ["quickstart", "cpu"]
    twin = nanochat.train(presets, overrides={**overrides, "train.total_steps": 3}, name="twin", quiet=True)
    assert twin.path.resolve() == folder / "runs" / "twin"
    timed = {"seconds", "date"}

    def measured(found: nanochat.Run) -> list[dict]:
        kept = [{k: v for k, v in one.items() if not k.startswith("throughput/")} for one in found.metrics]
        return [{k: v for k, v in one.items() if k not in timed} for one in kept]

    assert measured(twin) == measured(nanochat.Run(run))
    twin = nanochat.train(resume=twin, overrides={"train.total_steps": 4}, quiet=True)
    assert twin.metrics[-1]["step"] == 4
    assert main(["eval", "runs/twin", "--json", "eval.json"]) == 0
    assert nanochat.evaluate(twin, quiet=True) == result(folder, "eval.json")
    assert main(["export", "runs/twin", "--gguf", "--type", "f16", "--out", "by-command.gguf", "--quiet"]) == 0
    written = twin.export("gguf", "by-python.gguf", overrides={"export.type": "f16"}, quiet=True)
    assert written.read_bytes() == (folder / "by-command.gguf").read_bytes()
    assert twin.results["verification"]
