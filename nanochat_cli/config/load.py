"""From presets, a file and `--set` to one validated Config, and from a Config back to TOML.

The order is: the base of the file, presets left to right, the file, every `--set`, the short options; later ones win
key by key. The base of a preset comes right before it. A key of the last three, or of a preset with a base, also
displaces an earlier preset's key for the same thing (`SUPERSEDES`). Each error is one line with the key, its value,
where it came from, and what is allowed.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tomlkit
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from tomlkit.items import Table

from nanochat_cli.config import presets as preset_files
from nanochat_cli.config.effects import is_record, warnings
from nanochat_cli.config.keys import format_value, leaves, tuple_length
from nanochat_cli.config.overrides import parse_override
from nanochat_cli.config.paths import find_paths
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sources import Setting, Settings, nest, read_source
from nanochat_cli.config.toml import read_toml
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
"""A key that is given -> the key that would leave it without effect if a preset sets it."""


def resolve_config(
    presets: Sequence[str] = (),
    file: Path | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Mapping[str, object]] = MappingProxyType({}),
    warn: Callable[[str], None] | None = None,
    inform: Callable[[str], None] | None = None,
    shape_of: Callable[[Path], Mapping[str, object]] | None = None,
) -> Config:
    """Compose and validate. A data set (`data.path`) sets the vocabulary, unless one of the last three does.

    options: command-line options that stand for keys, as option -> {key: value}; None is "not given". warn is told of
    settings of the last three that have no effect, inform of a vocabulary that was replaced. shape_of: [model] of what
    train.init names, which takes the place of that of presets other than overlays. Raises ConfigError.
    """
    named = [preset_files.load(name) for name in presets]
    sources: list[Settings] = []
    if file is not None:
        base, own = _read_file(file)
        named[:0] = base
        sources.append(own)
    sources.extend(read_source(parse_override(text), "--set") for text in overrides)
    for option, values in options.items():
        sources.append(read_source({key: value for key, value in values.items() if value is not None}, option))
    basis = {key: setting for preset in named for key, setting in _preset_settings(preset).items()}
    chosen = {key: setting for source in sources for key, setting in source.items()}
    settings = _displace(basis, chosen)
    if shape_of is not None and not any(map(is_record, sources)):
        own = {key for preset in named if preset.is_overlay for key in _preset_settings(preset)} | chosen.keys()
        settings = _shaped(settings, own, shape_of)
    config = _validate(settings)
    size = None if "model.vocab_size" in chosen else _vocabulary_of(config.data.path)
    if size not in (None, config.model.vocab_size):
        if inform is not None:
            inform(f"model.vocab_size = {size}, as {config.data.path} was tokenised; it was {config.model.vocab_size}")
        config = _validate(settings | {"model.vocab_size": Setting(size, f"data set {config.data.path}")})
    if warn is not None:
        for line in warnings(sources, config):
            warn(line)
    return config


def with_default_model(presets: Sequence[str], file: Path | None, default: str) -> list[str]:
    """The presets, preceded by `default` if nothing names a model: overlays alone, or a file of some keys.

    A file names a model by its base, or by most keys there are, as the config.toml of a run. Raises ConfigError.
    """
    base, own = ([], {}) if file is None else _read_file(file)
    if base or is_record(own) or any(not preset_files.load(name).is_overlay for name in presets):
        return list(presets)
    return [default, *presets]


def load_run_config(run_dir: Path) -> Config:
    """The resolved configuration of a run. Raises DataError if `run_dir` is not a run."""
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
    """The configuration of the run in `run_dir`, with changes; paths in it are found even if the run was moved."""
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


def _read_file(file: Path) -> tuple[list[preset_files.Preset], Settings]:
    """The base of a --config file, if it has one, and its own settings."""
    table = read_toml(file, what="config")
    base = preset_files.take_base(table, file)
    own = read_source(table, str(file))
    if is_record(own) and "data.dedup" not in own:  # from before there was the key, when nothing was left out
        own |= {"data.dedup": Setting("none", str(file))}
    return ([] if base is None else [base]), own


def _preset_settings(preset: preset_files.Preset) -> Settings:
    """The settings of a preset on top of its bases; origins name the file that sets a key."""
    settings: Settings = {}
    for one in preset.lineage():
        origin = f"preset {one.name}" + ("" if one is preset else f", base of {preset.name}")
        settings = _displace(settings, read_source(one.values, origin))
    return settings


def _shaped(settings: Settings, own: Set[str], shape_of: Callable[[Path], Mapping[str, object]]) -> Settings:
    """The settings with the [model] of train.init, if that is set, in place of the presets'. own: keys that stay."""
    init = settings.get("train.init", Setting(None, ""))
    if not isinstance(init.value, str):
        return settings
    kept = {key: setting for key, setting in settings.items() if not key.startswith("model.") or key in own}
    return _displace(read_source({"model": shape_of(Path(init.value))}, f"train.init = {init.value}"), kept)


def _displace(basis: Settings, chosen: Settings) -> Settings:
    """Both, `chosen` winning, without the keys of `basis` that it supersedes."""
    displaced = {other for key, other in SUPERSEDES.items() if key in chosen}
    return {key: setting for key, setting in basis.items() if key not in displaced} | chosen


def _vocabulary_of(dataset: Path | None) -> int | None:
    """Tokens in the vocabulary of a data set, if it can be read; if not, opening it will say why."""
    if dataset is None:
        return None
    try:
        size = parse_json((dataset / "manifest.json").read_bytes())["tokenizer"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return size if isinstance(size, int) else None


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
    """What pydantic requires, in words that follow the key: mostly "must …"."""
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
    """A violated rule between several keys, in its own words, and where each key that it names was set."""
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
