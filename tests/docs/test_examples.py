"""What README.md and docs/ tell a reader to type exists: commands, options, presets, keys, make targets, scripts.

Nothing is executed; command lines go through the parser of the application itself, configurations through its
validation.
"""

import re
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomlkit
from pydantic_core import PydanticUndefined
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from benchmarks.update_figures import ROOT
from nanochat_cli.cli.app import COMMANDS, app
from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import resolve_config, with_default_model
from nanochat_cli.config.presets import names as preset_names
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.gguf.tensor_types import SUPPORT
from tests.docs.markdown import NAMES, Block, Table, blocks, having, read, tables

SEPARATORS = {"|", "||", ">", ">>", "&&", ";"}


def command_lines(text: str) -> list[list[str]]:
    """The words of every command in the shell blocks of a page, comments and what follows a pipe left out."""
    found = []
    for block in blocks(text):
        if block.language not in ("bash", "sh", "console"):
            continue
        for line in block.content.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if word not in SEPARATORS:
                    words.append(word)
                    continue
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words.pop(0)
                if words:
                    found.append(words)
                words = []
    return found


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Name and values of a command line of ours. Raises what the application would raise; runs no callback."""
    command = get_command(app)
    name = "nanochat"
    while isinstance(command, TyperGroup):
        context = command.context_class(command, info_name=name)
        _, rest, _ = command.make_parser(context).parse_args(list(words))
        if not rest:
            return name, {}
        found, command, words = command.resolve_command(context, rest)
        name = f"{name} {found}"
    assert command is not None
    for parameter in command.params:
        parameter.callback = None  # --json would open its file
    return name, command.make_context(name, list(words)).params


LINES = [(name, words) for name in NAMES for words in command_lines(read(ROOT / name))]
OURS = [
    list(line) for line in dict.fromkeys(tuple(words[1:]) for _, words in LINES if Path(words[0]).name == "nanochat")
]
TARGETS = sorted({(name, word) for name, words in LINES if words[0] == "make" for word in words[1:] if "=" not in word})
SCRIPTS = sorted({(name, words[1]) for name, words in LINES if words[0] == "python" and words[1] != "-m"})


@pytest.mark.parametrize("words", OURS, ids=" ".join)
def test_every_command_parses_and_its_configuration_is_valid(words: list[str]) -> None:
    name, values = parse(words)
    assert name.split()[1:] == words[: len(name.split()) - 1]
    if "overrides" in values:
        resolve_config(values.get("preset") or ["quickstart"], None, values.get("overrides") or [])


def test_every_command_is_shown_somewhere():
    visible = {name for name, entry in COMMANDS.items() if not entry.hidden} - {"quickstart"}
    assert visible <= {words[0] for words in OURS}


@pytest.mark.parametrize(("name", "target"), TARGETS)
def test_every_make_target_exists(name, target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


def test_make_help_tells_of_every_target_and_of_no_other():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    told = re.findall(r"^\t@echo 'make (\S+) +\S", makefile, re.MULTILINE)
    rules = re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE)
    (phony,) = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert sorted(told) == sorted(set(rules) - {"help"})
    assert sorted(phony.split()) == sorted(rules)


@pytest.mark.parametrize(("name", "script"), SCRIPTS)
def test_every_script_exists(name, script):
    assert (ROOT / script).is_file()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "trian"),
        ("train --prest x", "--prest"),
        ("generate --top-k many", "--top-k"),
        ("eval one two", "two"),
        ("presets shwo quickstart", "shwo"),
    ],
)
def test_a_command_that_does_not_exist_is_found_out(line, message):
    with pytest.raises(TyperException) as failure:
        parse(line.split())
    assert message in failure.value.format_message()


def test_a_preset_or_key_that_does_not_exist_is_found_out():
    with pytest.raises(ConfigError):
        test_every_command_parses_and_its_configuration_is_valid(["train", "--set", "train.stepz=3"])


def toml_blocks(text: str) -> list[Block]:
    return [block for block in blocks(text) if block.language == "toml"]


@pytest.mark.parametrize("name", having(toml_blocks))
def test_every_toml_example_is_a_valid_configuration(name, tmp_path):
    for block in toml_blocks(read(ROOT / name)):
        file = tmp_path / "example.toml"
        file.write_text(block.content, encoding="utf-8")
        resolved = resolve_config(with_default_model([], file, "quickstart"), file).model_dump(mode="json")
        written = tomlkit.parse(block.content).unwrap()
        written.pop("base", None)
        assert holds(resolved, written)


def holds(resolved: dict[str, Any], written: dict[str, Any]) -> bool:
    """Whether every value that is written in sections is the resolved one."""
    return all(
        holds(resolved[key], value) if isinstance(value, dict) else resolved[key] == value
        for key, value in written.items()
        if key not in ALIASES or key in resolved
    )


def key_tables(text: str) -> list[Table]:
    return [table for table in tables(text) if table.header[:2] == ["key", "default"]]


@pytest.mark.parametrize("name", having(key_tables))
def test_configuration_tables_name_real_keys_and_their_defaults(name):
    for table in key_tables(read(ROOT / name)):
        assert table.rows
        for key, default, *_ in table.rows:
            field = leaves()[key.strip("`")]
            value = field.default_factory() if field.default_factory else field.default  # pyright: ignore[reportCallIssue]
            assert value is not PydanticUndefined
            written = default.strip("`")
            found = None if written == "none" else tomlkit.parse(f"value = {written}").unwrap()["value"]
            plain = list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
            assert found == plain, key


def test_the_table_of_presets_has_them_all():
    (table,) = [t for t in tables(read(ROOT / "docs/configuration.md")) if t.header[0] == "preset"]
    assert {row[0].strip("`") for row in table.rows} == set(preset_names())


def test_the_table_of_aliases_is_the_program_s():
    (table,) = [t for t in tables(read(ROOT / "docs/configuration.md")) if t.header[0] == "flat spelling"]
    written = {alias: row[1].strip("`") for row in table.rows for alias in re.findall(r"`(\w+)`", row[0])}
    assert written == ALIASES


def test_the_table_of_where_types_run_is_the_program_s():
    (table,) = [t for t in tables(read(ROOT / "docs/exporting.md")) if "CUDA" in t.header]
    expected = {
        name: [f"{support.bits_per_weight:g}", *list(asdict(support).values())[1:]] for name, support in SUPPORT.items()
    }
    assert {row[0].strip("`"): row[1:] for row in table.rows} == expected
