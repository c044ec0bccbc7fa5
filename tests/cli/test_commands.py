"""What each command asks of the Engine, and what `presets` and `--json` print."""

import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from typer.main import get_command

from nanochat_cli import __version__
from nanochat_cli.cli.app import COMMANDS
from nanochat_cli.config.load import CONFIG_FILE, config_to_toml, resolve_config
from nanochat_cli.engine import Engine


class RecordingEngine:
    """Calls of the Engine's methods: (name, positional arguments, keyword arguments)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        for name in ("tokenize", "train", "evaluate", "generate", "export", "quickstart"):
            monkeypatch.setattr(Engine, name, self._recorder(name))

    def _recorder(self, name: str) -> Any:
        def record(engine: Engine, *arguments: Any, **keywords: Any) -> None:
            self.calls.append((name, arguments, keywords))
            engine.reporter.result({"called": name})

        return record

    @property
    def last(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        return self.calls[-1]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> RecordingEngine:
    return RecordingEngine(monkeypatch)


def make_run(folder: Path, name: str, saved_at: int | None = None) -> Path:
    """A run with a configuration, and a checkpoint pointer written at `saved_at`."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    (run / CONFIG_FILE).write_text(config_to_toml(resolve_config(["quickstart"])))
    if saved_at is not None:
        pointer = run / "checkpoints" / "latest"
        pointer.parent.mkdir()
        pointer.write_text("step-000001")
        os.utime(pointer, (saved_at, saved_at))
    return run


def test_version(nanochat):
    outcome = nanochat("--version")
    assert (outcome.code, outcome.out) == (0, f"nanochat {__version__}\n")


def commands() -> Iterator[tuple[str, ...]]:
    for name, entry in COMMANDS.items():
        command = get_command(importlib.import_module(f"nanochat_cli.cli.{entry.module}").app)
        yield (name,)
        yield from ((name, part) for part in getattr(command, "commands", {}))


@pytest.mark.parametrize("line", list(commands()), ids=" ".join)
def test_words_in_square_brackets_are_in_the_help(nanochat, monkeypatch, line):
    # Typer's help is markup of Rich, which takes an unescaped [word] for a style and swallows it.
    monkeypatch.setenv("COLUMNS", "2000")
    command = get_command(importlib.import_module(f"nanochat_cli.cli.{COMMANDS[line[0]].module}").app)
    part = command if len(line) == 1 else command.commands[line[1]]
    sources = [part.help or "", *(getattr(parameter, "help", None) or "" for parameter in part.params)]
    written = {found for text in sources for found in re.findall(r"\[[a-z/#@][^\]]*\]", text)}
    shown = nanochat(*line, "--help").out
    assert all(found in shown for found in written), written


def test_train_without_anything_is_quickstart(nanochat, engine):
    assert nanochat("train").code == 0
    assert engine.last == ("train", (resolve_config(["quickstart"]), None, "quickstart"), {"show": False})


def test_train_composes_and_names_the_run_after_its_first_preset(nanochat, engine, folder):
    (folder / "mine.toml").write_text("[train]\nbatch_size = 2\n")
    line = "train --preset nano-125m --preset overlays/cpu --config mine.toml --set train.total_steps=3"
    assert nanochat(*line.split()).code == 0
    _, (config, _, stem), _ = engine.last
    assert (config.model.dim, config.train.dtype, config.train.batch_size, config.train.total_steps) == (
        768,
        "fp32",
        2,
        3,
    )
    assert (config.run.name, stem) == (None, "nano-125m")


def test_an_overlay_names_no_run_and_changes_quickstart_when_alone(nanochat, engine):
    nanochat("train", "--preset", "cpu", "--preset", "test-mtp")
    assert engine.last[1][2] == "test-mtp"
    nanochat("train", "--preset", "cpu")
    config, _, stem = engine.last[1]
    assert (stem, config.model.dim, config.train.device) == ("quickstart", 256, "cpu")


def test_flat_keys_alone_change_quickstart(nanochat, engine, folder):
    (folder / "seeds.toml").write_text("hidden_dim = 512\nnum_heads = 8\nnum_kv_heads = 4\ntotal_steps = 50\n")
    outcome = nanochat("train", "--config", "seeds.toml")
    config, _, stem = engine.last[1]
    assert (stem, config.model.dim, config.model.vocab_size) == ("seeds", 512, 4096)
    assert (config.train.total_steps, config.train.time_budget) == (50, None)
    assert "no preset names a model: starting from quickstart" in outcome.err


def test_a_setting_without_effect_is_a_warning_of_the_command(nanochat, engine):
    outcome = nanochat("train", "--set", "optim.lion_lr_mult=0.2")
    assert 'optim.lion_lr_mult (--set): no effect; needs optim.other = "lion", not "adamw"' in outcome.err
    assert outcome.code == 0


def test_a_run_of_a_config_file_is_named_after_the_file(nanochat, engine, folder):
    (folder / "mine.toml").write_text("[train]\nbatch_size = 2\n")
    nanochat("train", "--config", "mine.toml")
    assert engine.last[1][2] == "mine"


def test_train_name(nanochat, engine):
    nanochat("train", "--name", "first")
    assert engine.last[1][0].run.name == "first"


def test_resume_takes_the_run_that_saved_last_and_its_own_config(nanochat, engine, folder):
    make_run(folder, "old", saved_at=1_000)
    newest = make_run(folder, "newer", saved_at=2_000)
    make_run(folder, "never-saved")
    assert nanochat("train", "--resume", "--set", "train.total_steps=9").code == 0
    name, (config, resume, _), _ = engine.last
    assert (name, resume.resolve()) == ("train", newest)
    assert config.train.total_steps == 9


@pytest.mark.parametrize("line", ["train --resume old", "train --resume runs/old", "train --resume --name old"])
def test_resume_takes_a_name_or_a_path(nanochat, engine, folder, line):
    old = make_run(folder, "old", saved_at=1_000)
    make_run(folder, "newer", saved_at=2_000)
    nanochat(*line.split())
    assert engine.last[1][1].resolve() == old


def test_resume_says_that_a_preset_is_not_read_again(nanochat, engine, folder):
    make_run(folder, "old", saved_at=1_000)
    outcome = nanochat("train", "--preset", "nano-125m", "--resume")
    assert outcome.code == 0
    assert outcome.err.startswith("warning: --resume continues runs/old with its own config.toml")
    assert engine.last[1][0].model.dim == resolve_config(["quickstart"]).model.dim


AUTO = "train --preset quickstart --set train.total_steps=7 --set model.n_layers=3 --name old --resume auto"


@pytest.mark.parametrize("is_claimed", [False, True])
def test_resume_auto_begins_a_run_that_has_no_checkpoint(nanochat, engine, folder, is_claimed):
    make_run(folder, "other", saved_at=1_000)
    if is_claimed:
        make_run(folder, "old")
    assert nanochat(*AUTO.split()).code == 0
    config, resume, stem = engine.last[1]
    assert resume == (Path("runs/old") if is_claimed else None)
    assert (config.run.name, config.model.n_layers, config.train.total_steps, stem) == ("old", 3, 7, "quickstart")


def test_resume_auto_goes_on_with_the_run_of_that_name_and_its_own_config(nanochat, engine, folder):
    make_run(folder, "old", saved_at=1_000)
    make_run(folder, "newer", saved_at=2_000)
    outcome = nanochat(*AUTO.replace("--set model.n_layers=3", "--preset test-mtp").split())
    assert (outcome.code, outcome.err) == (0, "")
    config, resume, _ = engine.last[1]
    assert resume == Path("runs/old")
    assert (config.train.total_steps, config.model) == (7, resolve_config(["quickstart"]).model)


def test_tokenize_passes_its_short_options_into_the_configuration(nanochat, engine, folder):
    (folder / "crates").mkdir()
    (folder / "tokenizer.json").write_text("{}")
    line = (
        "tokenize --source crates --glob *.rs --vocab-size 512 --tokenizer tokenizer.json --set data.val_fraction=0.1"
    )
    assert nanochat(*line.split()).code == 0
    name, (source, out, config), _ = engine.last
    assert (name, source, out) == ("tokenize", "crates", Path("data/crates"))
    assert (config.data.source, config.data.glob, config.data.val_fraction) == ("crates", "*.rs", 0.1)
    assert (config.model.vocab_size, config.tokenizer.path) == (512, Path("tokenizer.json"))


def write_manifest(folder: Path, vocab_size: int) -> None:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": {"vocab_size": vocab_size}}))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("train --preset nano-125m --set data.path=mine", 4096),
        ("train --config shape.toml --set data.path=mine", 4096),
        ("train --preset nano-125m --config path.toml", 4096),
        ("train --preset nano-125m --set data.path=mine --set model.vocab_size=512", 512),
        ("train --preset nano-125m --set data.path=mine --set vocab_size=512", 512),
        ("train --config vocabulary.toml --set data.path=mine", 600),
        ("train --preset nano-125m", 32768),
    ],
)
def test_training_takes_the_vocabulary_of_the_data_unless_another_is_given(nanochat, engine, folder, line, expected):
    write_manifest(folder / "mine", 4096)
    (folder / "shape.toml").write_text("[model]\ndim = 512\n")
    (folder / "vocabulary.toml").write_text("vocab_size = 600\n")
    (folder / "path.toml").write_text('[data]\npath = "mine"\n')
    outcome = nanochat(*line.split())
    assert outcome.code == 0
    assert engine.last[1][0].model.vocab_size == expected
    changed = "model.vocab_size = 4096, as mine was tokenised; it was 32768" in outcome.err
    assert changed == ("nano-125m" in line and expected == 4096)


def test_tokenize_takes_the_vocabulary_and_the_tokenizer_of_a_preset(nanochat, engine, folder):
    (folder / "text").mkdir()
    nanochat("tokenize", "--source", "text", "--preset", "nano-125m")
    config = engine.last[1][2]
    assert config.model.vocab_size == 32768
    assert config.tokenizer == resolve_config(["nano-125m"]).tokenizer
    nanochat("tokenize", "--source", "text", "--preset", "nano-125m", "--vocab-size", "512")
    assert engine.last[1][2].model.vocab_size == 512


@pytest.mark.parametrize(
    ("source", "out"), [("stdlib", "data/stdlib"), ("hf:org/code@rust:train", "data/code"), (".", None)]
)
def test_tokenize_names_its_folder_after_the_source(nanochat, engine, folder, source, out):
    nanochat("tokenize", "--source", source)
    assert engine.last[1][1] == Path(out or f"data/{folder.stem}")


def test_generate_passes_the_sampling_settings(nanochat, engine, folder):
    run = make_run(folder, "old", saved_at=1)
    line = "generate old -p x --max-tokens 5 --temperature 0 --top-k 3 --top-p 0.5 --seed 7 --no-stream --backend cpu"
    nanochat(*line.split(), "--repetition-penalty", "1.5", "--stop", "\n\n", "--stop", "#")
    name, (target, prompt), keywords = engine.last
    assert (name, target.resolve(), prompt) == ("generate", run, "x")
    assert keywords == {
        "which": "latest",
        "stream": False,
        "backend": "cpu",
        "speculate": 0,
        "max_tokens": 5,
        "temperature": 0.0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.0,
        "repetition_penalty": 1.5,
        "seed": 7,
        "stop": ("\n\n", "#"),
    }


def test_generate_takes_a_gguf_file(nanochat, engine, folder):
    (folder / "model.gguf").write_bytes(b"GGUF")
    assert nanochat("generate", "model.gguf").code == 0
    assert engine.last[1][0] == Path("model.gguf")


@pytest.mark.parametrize("command", ["export", "export-gguf"])
def test_export_takes_the_latest_run_and_writes_beside_it(nanochat, engine, folder, command):
    make_run(folder, "old", saved_at=1_000)
    make_run(folder, "newer", saved_at=2_000)
    assert nanochat(command, "--gguf").code == 0
    name, (run, out, export, which), _ = engine.last
    assert which == "latest"
    assert (name, run, out) == ("export", Path("runs/newer"), Path("runs/newer/model.gguf"))
    assert export == resolve_config(["quickstart"]).export


def test_export_options_override_the_run(nanochat, engine, folder):
    make_run(folder, "old", saved_at=1)
    nanochat(*["export", "old", "--out", "here.gguf", "--type", "tq1_0", "--head", "f32", "--no-verify"])
    _, (_, out, export, _), _ = engine.last
    assert (out, export.type, export.head, export.verify) == (Path("here.gguf"), "tq1_0", "f32", False)


def test_eval_takes_the_latest_run(nanochat, engine, folder):
    make_run(folder, "old", saved_at=1)
    nanochat("eval")
    assert engine.last[:2] == ("evaluate", (Path("runs/old"), "latest"))


def test_quickstart_runs_in_the_folder_that_it_is_given(nanochat, engine):
    nanochat("quickstart", "--out", "elsewhere/mine", "--set", "train.time_budget=5")
    name, (config,), _ = engine.last
    assert (name, config.run.dir, config.run.name) == ("quickstart", Path("elsewhere"), "mine")
    assert config.train.time_budget == 5


def test_json_holds_what_the_engine_found(nanochat, engine, folder):
    nanochat("train", "--json", "result.json")
    assert json.loads((folder / "result.json").read_text()) == {"called": "train"}


def test_presets_lists_names_with_counted_parameters(nanochat):
    listed = nanochat("presets").out
    assert listed == nanochat("presets", "list").out
    assert "nano-125m" in listed
    assert "121.9M" in listed
    assert "overlay" in listed


def test_presets_quiet_is_one_name_per_line(nanochat):
    names = nanochat("presets", "list", "--quiet").out.splitlines()
    assert {"quickstart", "nano-125m", "d20", "cpu"} <= set(names)


def test_presets_json_has_exact_counts(nanochat, folder):
    nanochat("presets", "--json", "presets.json")
    found = {entry["name"]: entry for entry in json.loads((folder / "presets.json").read_text())["presets"]}
    assert found["nano-125m"]["parameters"] == 121_916_160
    assert found["cpu"]["parameters"] is None
    assert (found["d20-mtp"]["base"], found["d20"]["base"]) == ("d20", None)


def test_presets_show_is_the_file_and_resolved_is_everything(nanochat):
    shown = tomlkit.parse(nanochat("presets", "show", "nano-125m").out).unwrap()
    assert shown["label"] == "125M"
    assert "telemetry" not in shown
    resolved = tomlkit.parse(nanochat("presets", "show", "nano-125m", "--resolved").out).unwrap()
    assert resolved["model"]["dim"] == shown["model"]["dim"]
    assert "telemetry" in resolved


def test_a_reader_that_leaves_early_is_not_an_error(folder):
    import subprocess
    import sys

    command = f"{sys.executable} -m nanochat_cli.cli.app presets show d20 --resolved | head -n 1"
    child = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")


def test_tensorboard_is_served_beside_a_run_that_writes_for_it(nanochat, engine):
    nanochat("train", "--tensorboard")
    assert engine.last[2] == {"show": True}
    outcome = nanochat("train", "--tensorboard", "--set", "telemetry.tensorboard=false")
    assert outcome.code == 2
    assert outcome.error.startswith("--tensorboard has nothing to show")


def test_config_schema_goes_to_standard_output_or_to_a_file(nanochat, folder):
    shown = json.loads(nanochat("config", "schema").out)
    said = nanochat("config", "schema", "--out", "schema.json").err
    assert json.loads((folder / "schema.json").read_text()) == shown
    assert "#:schema schema.json" in said
    assert shown["properties"]["hidden_dim"]["type"] == "integer"
    outcome = nanochat("config", "schema", "--out", "none/schema.json")
    assert outcome.code == 3
    assert outcome.error.startswith("--out none/schema.json: ")
