"""What a person gets for a mistake: one line that says what to do, and the documented exit code."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest

from nanochat_cli.cli.options import BackendName
from nanochat_cli.config.load import CONFIG_FILE, config_to_toml, resolve_config
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.find import require_writable
from nanochat_kernels.backends import BACKENDS

USAGE, DATA = 2, 3

MISTAKES = [
    # (command line, exit code, what the line must contain)
    ("trian", USAGE, "Did you mean 'train'?"),
    ("train --stes 3", USAGE, "--stes"),
    ("train --preset nano-125", USAGE, "did you mean nano-125m?"),
    ("train --preset", USAGE, "--preset"),
    ("train --preset missing.toml", USAGE, "no such file"),
    ("train --config missing.toml", USAGE, "missing.toml: no such config file"),
    ("train --config broken.toml", USAGE, "broken.toml: not valid TOML"),
    ("train --config binary.toml", USAGE, "binary.toml: not UTF-8 text"),
    ("train --config typo.toml", USAGE, "did you mean train.batch_size?"),
    ("train --config base.toml", USAGE, 'base = "d21" (base.toml): no such preset; did you mean d20?'),
    ("train --set model.n_headz=3", USAGE, "did you mean model.n_heads?"),
    ("train --set train.batch_size=eight", USAGE, "must be an integer, not a string"),
    ("train --set train.batch_size=0", USAGE, "must be greater than 0"),
    ("train --set train.batch_size", USAGE, "write KEY=VALUE"),
    ("train --set optim.schedule=wsdd", USAGE, "did you mean wsd?"),
    ("train --set model.dim=192 --set model.quant.scale=128", USAGE, "must be a multiple of quant.scale = 128"),
    ("train --set model.n_kv_heads=3", USAGE, "must be a multiple of n_kv_heads = 3"),
    ("train --set train.seq_len=4096", USAGE, "longer than model.max_seq_len"),
    ("train --set train.grad_input=fp8", USAGE, "needs a GPU of compute capability 8.9 or later"),
    ("train --set collider.score=excess --set use_collider=true", USAGE, "score = excess needs reference"),
    ("train --name a/b", USAGE, "must be the name of a folder"),
    ("train --name taken", USAGE, "a run of that name exists"),
    ("train runs/x", USAGE, "only named with --resume"),
    ("train --set data.path=missing", DATA, "data.path = missing: not a data set: no such folder"),
    ("train --set data.path=empty", DATA, "it has no manifest.json"),
    ("train --set run.dir=broken.toml", DATA, "broken.toml is not a folder"),
    ("train --resume", DATA, "no run with a checkpoint here"),
    ("train --resume nowhere", DATA, "nowhere: no such run"),
    ("train --resume empty", DATA, "not a run of nanochat train"),
    ("train --resume auto", USAGE, "which run? Name it with --name"),
    ("tokenize --source missing", DATA, "--source missing: no such file or folder"),
    ("tokenize --tokenizer missing.json", DATA, "--tokenizer missing.json: no such file"),
    ("tokenize --vocab-size 0", USAGE, "--vocab-size"),
    ("tokenize --vocab-size many", USAGE, "--vocab-size"),
    ("tokenize --out broken.toml/data", DATA, "broken.toml is not a folder"),
    ("eval", DATA, "no run with a checkpoint here"),
    ("eval nowhere", DATA, "nowhere: no such run"),
    ("generate", DATA, "no run with a checkpoint here"),
    ("generate missing.gguf", DATA, "missing.gguf: no such file"),
    ("generate --top-p 2", USAGE, "--top-p"),
    ("generate --temperature hot", USAGE, "--temperature"),
    ("generate --max-tokens 0", USAGE, "--max-tokens"),
    ("generate --backend avx", USAGE, "--backend"),
    ("export", DATA, "no run with a checkpoint here"),
    ("export taken --type q5", USAGE, 'export.type = "q5" (--type): must be'),
    ("export taken --head q8_0", USAGE, 'export.head = "q8_0" (--head): must be'),
    ("export taken --out broken.toml/model.gguf", DATA, "broken.toml is not a folder"),
    ("presets shw", USAGE, "Did you mean 'show'?"),
    ("presets show", USAGE, "NAME"),
    ("presets show nano", USAGE, "did you mean nano-125m?"),
    ("presets --json missing/result.json", DATA, "--json missing/result.json: cannot be written"),
]


@pytest.fixture
def mistakes(folder: Path) -> Path:
    """A folder with files for wrong commands."""
    (folder / "broken.toml").write_text("[train\n")
    (folder / "binary.toml").write_bytes(bytes(range(128, 256)))
    (folder / "typo.toml").write_text("[train]\nbatchsize = 3\n")
    (folder / "base.toml").write_text('base = "d21"\n')
    (folder / "empty").mkdir()
    taken = folder / "runs" / "taken"
    taken.mkdir(parents=True)
    (taken / CONFIG_FILE).write_text(config_to_toml(resolve_config(["quickstart"])))
    return folder


@pytest.mark.usefixtures("mistakes")
@pytest.mark.parametrize(("line", "code", "message"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_is_one_line_and_its_exit_code(nanochat, line, code, message):
    outcome = nanochat(*line.split())
    assert outcome.code == code, outcome.err
    assert message in outcome.error
    assert outcome.out == ""


@pytest.mark.usefixtures("mistakes")
def test_json_holds_the_error_too(nanochat, folder):
    nanochat("train", "--set", "train.batch_size=0", "--json", "result.json")
    result = json.loads((folder / "result.json").read_text())
    assert result == {"error": "train.batch_size = 0 (--set): must be greater than 0", "exit_code": 2}


def test_verbose_shows_the_traceback_before_the_line(nanochat):
    outcome = nanochat("train", "--set", "train.batch_size=0", "--verbose")
    assert outcome.code == USAGE
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: train.batch_size")


def test_a_read_only_folder_is_refused_before_any_work(monkeypatch, tmp_path):
    # The tests may run as root, for whom nothing is read-only, so the system's answer is simulated.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=f"{tmp_path} is read-only"):
        require_writable(tmp_path / "runs" / "x")


def test_no_command_is_help_and_a_usage_error(nanochat):
    outcome = nanochat()
    assert outcome.code == USAGE
    assert "quickstart" in outcome.out + outcome.err
    assert "error" not in outcome.err


def test_an_unknown_backend_is_named_with_the_known_ones(nanochat, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BACKEND", "avx")
    outcome = nanochat("generate")
    assert outcome.code == USAGE
    assert outcome.error == "NANOCHAT_BACKEND = avx does not exist: choose one of reference, cpu, triton"


def test_the_command_line_knows_the_backends_of_the_kernels():
    assert get_args(BackendName) == BACKENDS
