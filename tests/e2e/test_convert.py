"""`nanochat convert`: a float model becomes a ternary run with a report, from a run or a file; mistakes are a line."""

import json
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import load_run_config
from nanochat_cli.formats.open import open_run
from nanochat_cli.report.metrics_log import read_metrics
from tests.e2e.tiny import TINY, write_corpus
from tests.evaluation.saved_runs import save_run

SMALL = "train.total_steps=8 train.batch_size=2 train.seq_len=32 train.compile=off telemetry.tensorboard=false"
SETTINGS = [word for key in f"{SMALL} checkpoint.interval=2 train.device=cpu".split() for word in ("--set", key)]


@pytest.fixture
def float_run(tmp_path, monkeypatch):
    """A folder with a corpus in src/, the same as a data set in data/, and a float run of a few steps in runs/float."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "src")
    assert main(["tokenize", "--source", "src", "--vocab-size", "300", "--out", "data"]) == 0
    train = ["train", *TINY, "--name", "float", "--set", "train.total_steps=6", "--set", "data.path=data"]
    assert main([*train, "--set", "model.quant.enabled=false"]) == 0
    return tmp_path / "runs" / "float"


def results(name: str) -> dict:
    return json.loads(Path("runs", name, "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_float_run_is_converted_continued_and_compared(float_run, tmp_path):
    convert = ["convert", "runs/float", "--data", "data", "--out", "runs/small", *SETTINGS]
    assert main([*convert, "--scratch", "--json", "out.json"]) == 0
    config = load_run_config(tmp_path / "runs" / "small")
    assert config.train.init == float_run
    assert str(config.distill.teacher) == "init"
    assert config.model.quant.enabled
    assert config.model.quant.ramp == 0.3
    assert config.model.dim == load_run_config(float_run).model.dim
    models = results("small")["conversion"]["models"]
    assert json.loads((tmp_path / "out.json").read_text())["conversion"]["models"] == models
    assert models.keys() == {"teacher", "converted", "from scratch"}
    assert (models["teacher"]["top1"], models["teacher"]["divergence"]) == (1, 0)
    for name, run in (("converted", "small"), ("from scratch", "small-scratch")):
        assert models[name]["bits_per_byte"] == pytest.approx(results(run)["results"]["bits_per_byte"], rel=1e-9)
        assert models[name]["file_bytes"] == (tmp_path / "runs" / run / "model.gguf").stat().st_size
        assert models[name]["divergence"] > 0
        assert open_run(tmp_path / "runs" / run).ternary_share == 1
    tokens = {run: results(run)["results"]["training_tokens"] for run in ("small", "small-scratch")}
    assert len(set(tokens.values())) == 1
    losses = [line["loss/distillation"] for line in read_metrics(tmp_path / "runs" / "small") if "loss/main" in line]
    assert losses
    assert min(losses) > 0
    assert models["converted"]["divergence"] < models["from scratch"]["divergence"]

    assert main(["convert", "runs/float", "--out", "runs/small", "--resume", "--set", "train.total_steps=10"]) == 0
    assert results("small")["results"]["steps"] == 10


@pytest.mark.slow
def test_a_file_is_imported_and_text_tokenised_in_its_tokens(float_run, tmp_path):
    assert main(["export", "runs/float", "--gguf", "--type", "f16", "--out", "float.gguf"]) == 0
    assert main(["convert", "float.gguf", "--data", "src", *SETTINGS]) == 0
    run, teacher = (tmp_path / "runs" / name for name in ("float-ternary", "float-ternary-teacher"))
    assert (run / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    assert (run / "model.gguf").is_file()
    assert results("float-ternary")["conversion"]["models"].keys() == {"teacher", "converted"}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ("runs/float", 2, "--data: what the model is trained on"),
        ("runs/none --data src", 3, "runs/none: no such folder or file"),
        ("runs/ternary --data src", 2, "runs/ternary is ternary: train it further with nanochat train"),
        ("runs/float --data none", 3, "--data none: no such data set, folder or file"),
        ("runs/float --data src --out runs/ternary", 2, "runs/ternary: a run of that name exists"),
        ("runs/float --data src --set model.dim=128", 2, "has the architecture of its teacher; leave it out"),
        ("runs/float --data src --set model.quant.ramp=1.5", 2, "model.quant.ramp = 1.5"),
        ("runs/float --data src --set distill.wieght=1", 2, "did you mean distill.weight?"),
        ("runs/float --resume --out runs/float", 2, "not a conversion (it has no train.init)"),
        ("runs/float --data src --preset nothing", 2, "nothing"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_begun(words, code, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    save_run(tmp_path / "runs" / "float", quant={"enabled": False})
    save_run(tmp_path / "runs" / "ternary")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", *words.split()]) == code
    said = capsys.readouterr().err.splitlines()
    assert says in said[-1]
    assert said[-1].startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
