"""From presets, a file and `--set` to one validated Config, and from a Config back to TOML.

The order is: presets left to right, the file, every `--set`, the short options; later wins key by key. A key of the
last three also takes the place of what a preset says with another key about the same thing (`SUPERSEDES`). Each error
is one line with the key, its value, where it came from, and what is allowed.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tomlkit.items import Table

from nanochat_cli.config import presets as preset_files
from nanochat_cli.config.effects import is_record, warnings
from nanochat_cli.config.files import read_toml
from nanochat_cli.config.keys import format_value, leaves, tuple_length
from nanochat_cli.config.layers import Layer, Setting, merge, nest, read_layer
from nanochat_cli.config.overrides import parse_override
from nanochat_cli.config.paths import find_paths
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.nesting import parse_json

CONFIG_FILE = "config.toml"
"""Name of the resolved configuration inside a run."""
SUPERSEDES = {
    "model.ffn_mult": "model.ffn_dim",
    "model.deltanet.ratio": "model.deltanet.pattern",
    "model.deltanet.pattern": "model.deltanet.ratio",
    "train.total_steps": "train.time_budget",
}
"""A key that is given -> the key of a preset that would make it mean nothing."""


def resolve_config(
    presets: Sequence[str] = (),
    file: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    warn: Callable[[str], None] | None = None,
    inform: Callable[[str], None] | None = None,
) -> Config:
    """Compose and validate. A data set (`data.path`) brings the vocabulary, unless one of the last three names another.

    options: command-line options that are short for keys, as option -> {key: value}; None is "not given". warn is told
    of settings of the last three kinds that have no effect, inform of a vocabulary that gave way. Raises ConfigError.
    """
    basis = merge(_preset_layer(name) for name in presets)
    layers = []
    if file is not None:
        layers.append(read_layer(read_toml(file, what="config"), str(file)))
    layers.extend(read_layer(parse_override(text), "--set") for text in overrides)
    for option, values in options.items():
        given = {key: value for key, value in values.items() if value is not None}
        layers.append(read_layer(given, option))
    chosen = merge(layers)
    for key, other in SUPERSEDES.items():
        if key in chosen and other not in chosen:
            basis.pop(other, None)
    config = _validate(basis | chosen)
    found = None if "model.vocab_size" in chosen else _vocabulary_of(config.data.path)
    if found not in (None, config.model.vocab_size):
        if inform is not None:
            inform(f"model.vocab_size = {found}, as {config.data.path} was tokenised; it was {config.model.vocab_size}")
        config = _validate(basis | chosen | {"model.vocab_size": Setting(found, f"data set {config.data.path}")})
    if warn is not None:
        for line in warnings(layers, config):
            warn(line)
    return config


def with_default_model(presets: Sequence[str], file: Path | None, default: str) -> list[str]:
    """The presets, after `default` where nothing names a model: overlays alone, or a file of some keys.

    A file with most keys there are, such as the config.toml of a run, is a model by itself. Raises ConfigError.
    """
    if any(not preset_files.load(name).is_overlay for name in presets):
        return list(presets)
    if file is not None and is_record(read_layer(read_toml(file, what="config"), str(file)).settings):
        return list(presets)
    return [default, *presets]


def load_run_config(run_dir: Path) -> Config:
    """The resolved configuration of a run. Raises DataError when `run_dir` is not a run."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise DataError(f"{run_dir}: not a run of nanochat train (it has no {CONFIG_FILE})")
    return run_config(run_dir)


def run_config(
    run_dir: Path,
    overrides: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    warn: Callable[[str], None] | None = None,
) -> Config:
    """The configuration of the run in `run_dir` with changes; a path that it has from where it was started is found."""
    config = resolve_config(file=run_dir / CONFIG_FILE, overrides=overrides, options=options, warn=warn)
    find_paths(config, run_dir)
    return config


def config_to_toml(config: Config, header: str = "") -> str:
    """The whole configuration as TOML that resolves to an equal Config.

    Keys without a value (None) are left out; each field's description becomes its comment.
    """
    document = tomlkit.document()
    for line in header.splitlines():
        document.add(tomlkit.comment(line))
    for name in type(config).model_fields:
        document.add(name, _table(getattr(config, name)))
    return tomlkit.dumps(document)


def _vocabulary_of(dataset: Path | None) -> int | None:
    """Tokens of a data set; None where there is none that can be read, which whoever reads it will say."""
    if dataset is None:
        return None
    try:
        size = parse_json((dataset / "manifest.json").read_bytes())["tokenizer"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) else None


def _preset_layer(name: str) -> Layer:
    preset = preset_files.load(name)
    return read_layer(preset.values, f"preset {preset.name}")


def _validate(settings: Mapping[str, Setting]) -> Config:
    try:
        return Config.model_validate(nest(settings))
    except ValidationError as error:
        problems = error.errors()
    message = _explain(problems[0], settings)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    raise ConfigError(message + more)


def _explain(problem: Any, settings: Mapping[str, Setting]) -> str:
    """One line for one pydantic error."""
    location = ".".join(str(part) for part in problem["loc"])
    key = next((leaf for leaf in leaves() if location == leaf or location.startswith(leaf + ".")), None)
    if key is None:
        return _explain_relation(location, problem, settings)
    setting = settings.get(key, Setting(problem["input"], "default"))
    return f"{key} = {format_value(setting.value)} ({setting.origin}): {_requirement(key, problem, setting.value)}"


def _requirement(key: str, problem: Any, value: object) -> str:
    """What pydantic wanted, as a sentence that starts with "must"."""
    if problem["type"] == "literal_error":
        expected = str(problem["ctx"]["expected"])
        choices = re.findall(r"'([^']*)'", expected)
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        return f"must be {expected}" + (f"; did you mean {close[0]}?" if close else "")
    if problem["type"] in ("missing", "too_short", "too_long"):
        return f"must be an array of {tuple_length(key)} values"
    message = str(problem["msg"]).removeprefix("Value error, ").replace("Input should", "must")
    return message if message.startswith("must") else message[:1].lower() + message[1:]


def _explain_relation(section: str, problem: Any, settings: Mapping[str, Setting]) -> str:
    """A rule between several keys: the rule's own words, and where each key that it names was set."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    words = set(re.findall(r"[\w.]+", message))
    named = [
        f"{key}: {setting.origin}"
        for key, setting in settings.items()
        if key in words or (section and key.startswith(section + ".") and key.removeprefix(section + ".") in words)
    ]
    prefix = f"[{section}] " if section else ""
    return prefix + message + (f" ({'; '.join(named)})" if named else "")


def _table(section: BaseModel) -> Table:
    """A section as a TOML table: its values first, then its inner sections, as TOML requires."""
    table = tomlkit.table()
    fields = type(section).model_fields.items()
    for name, field in _values_first(fields, section):
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            table.add(name, _table(value))
        elif value is not None:
            item = tomlkit.item(_plain(value))
            if field.description:
                item.comment(field.description)
            table.add(name, item)
    return table


def _values_first(fields: Iterable[tuple[str, FieldInfo]], section: BaseModel) -> list[tuple[str, FieldInfo]]:
    return sorted(fields, key=lambda pair: isinstance(getattr(section, pair[0]), BaseModel))


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return value.as_posix()
    return list(value) if isinstance(value, tuple) else value
