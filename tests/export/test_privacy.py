"""What is exported names no folder of this machine, and so no person, unless that is asked for.

A marker stands in every path: it must not be in any byte of any exported file.
"""

import shutil
import tomllib
from pathlib import Path

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.config.load import config_to_toml
from nanochat_cli.config.paths import with_names_only
from nanochat_cli.config.schema import Config
from nanochat_cli.export import llama_cpp, transformers_parity
from nanochat_cli.formats.gguf.file import GGUFFile
from tests.data.corpora import write_folder

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written" / "runs" / "plain"
PERSON = "zacharias"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a person, whose name is in every path, and in the environment."""
    home = tmp_path / "home" / PERSON
    home.mkdir(parents=True)
    monkeypatch.chdir(home)
    for name, value in {"HOME": str(home), "USER": PERSON, "LOGNAME": PERSON, "NANOCHAT_CACHE": f"{home}/c"}.items():
        monkeypatch.setenv(name, value)
    for other in (llama_cpp, transformers_parity):
        monkeypatch.setattr(other, "is_available", lambda: False)
    return home


@pytest.fixture
def run(home: Path) -> Path:
    """A run that was trained on a source of that person's, and with a tokenizer from there."""
    run = shutil.copytree(WRITTEN, home / "runs" / "plain")
    config = (run / "config.toml").read_text()
    config = config.replace('path = "/tmp/nanochat-fixtures/data"', "").replace('"stdlib"', f'"{home}/my sources"', 1)
    (run / "config.toml").write_text(config.replace('dir = "runs"', f'dir = "{home}/runs"'))
    assert config.count(PERSON) == 1
    return run


def containing(folder: Path, word: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if word.encode() in path.read_bytes() or word in path.name]


def test_a_gguf_file_and_a_folder_name_nobody(home: Path, run: Path) -> None:
    assert main(["export", str(run), "--hf", "--gguf", "--out", str(home / "out"), "--no-verify"]) == 0
    names = {path.name for path in (home / "out").iterdir()}
    assert {"model.gguf", "README.md", "model.safetensors", "checksums.json", "config.json"} <= names
    assert containing(home / "out", PERSON) == []
    assert containing(home / "out", str(home.parent)) == []
    fields = GGUFFile(home / "out" / "model.gguf").fields
    assert fields["nanochat.dataset"] == "my sources"
    assert tomllib.loads(fields["nanochat.config"])["run"]["dir"] == "runs"
    assert "trained on my sources:" in (home / "out" / "README.md").read_text()


def test_paths_are_recorded_when_that_is_asked_for(home: Path, run: Path) -> None:
    assert main(["export", str(run), "--no-verify", "--out", "m.gguf", "--set", "export.paths=true"]) == 0
    recorded = tomllib.loads(GGUFFile(home / "m.gguf").fields["nanochat.config"])
    assert recorded["data"]["source"] == str(home / "my sources")


def test_every_path_of_a_configuration_becomes_a_name() -> None:
    def marked(values: dict[str, object]) -> dict[str, object]:
        return {key: f"/home/{PERSON}/{key}" for key in values}

    paths: dict[str, dict[str, object]] = {
        "run": marked({"dir": 0}),
        "data": {**marked({"path": 0, "source": 0}), "sources": (f"a=/home/{PERSON}/x:2", "b=hf:org/set:1")},
        "tokenizer": marked({"path": 0}),
        "collider": marked({"reference": 0, "scores": 0}),
        "train": marked({"init": 0}),
        "distill": marked({"teacher": 0}),
        "grpo": marked({"source": 0, "rewards": 0, "library": 0, "task": 0}),
    }
    config = Config.model_validate(paths)
    bare = with_names_only(config)
    assert PERSON in config_to_toml(config)
    assert PERSON not in config_to_toml(bare)
    assert bare.data.sources == ("a=x:2", "b=hf:org/set:1")
    assert bare.grpo.library == Path("library")
    assert with_names_only(Config()) == Config()


def test_the_card_of_a_data_set_and_token_files_of_other_programs_name_nobody(home: Path) -> None:
    write_folder(home / "corpus", 30)
    line = ["tokenize", "--source", str(home / "corpus"), "--out", "data", "--vocab-size", "300"]
    assert main(line) == 0
    card = (home / "data" / "CARD.md").read_text()
    assert card.startswith("# Data set: corpus\n")
    assert PERSON not in card
    for form in ("nanotron", "megatron", "nanogpt", "llmc"):
        assert main(["data", "export", "data", "--format", form, "--out", form]) == 0
        assert containing(home / form, PERSON) == []
