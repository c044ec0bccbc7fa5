"""Sources of settings: nested tables become canonical dotted keys, each with the place that it came from.

A source is one preset, one file, one `--set` or one option. Here aliases are resolved, unknown keys are refused with
the closest one that exists, and kinds of value are checked. What a value means is left to `config.schema`, the order
of the sources to `config.load`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.keys import (
    accepted_kinds,
    closest_key,
    format_value,
    is_literal,
    join,
    kind_of,
    leaves,
    sections,
)
from nanochat_cli.errors import ConfigError


@dataclass(frozen=True)
class Setting:
    """A value and the place that a person would edit to change it."""

    value: object
    origin: str


Settings = dict[str, Setting]
"""By canonical key."""


def read_source(table: Mapping[str, object], origin: str) -> Settings:
    """Canonicalise a nested table. Raises ConfigError for unknown keys, keys set twice and wrong kinds of value."""
    settings: Settings = {}
    spelled: dict[str, str] = {}
    for written, value in _flatten(table):
        key = _canonical_key(written, value, origin)
        if key is None:
            continue
        if key in settings:
            raise ConfigError(f"{written} and {spelled[key]} ({origin}): both set {key}; keep one")
        _check_kind(key, written, value, origin)
        settings[key] = Setting(value, origin)
        spelled[key] = written
    return settings


def nest(settings: Mapping[str, Setting]) -> dict[str, object]:
    """Dotted settings as nested dicts of plain values."""
    root: dict[str, object] = {}
    for key, setting in settings.items():
        *path, name = key.split(".")
        table = root
        for part in path:
            inner = table.setdefault(part, {})
            assert isinstance(inner, dict)
            table = inner
        table[name] = setting.value
    return root


def _flatten(table: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of a nested table; an empty table counts as one, so that an unknown empty section is noticed."""
    for name, value in table.items():
        key = join(prefix, name)
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, key)
        else:
            yield key, value


def _canonical_key(written: str, value: object, origin: str) -> str | None:
    """The schema key that `written` means; None for an empty section."""
    if written in leaves():
        return written
    if written in sections():
        if value == {}:
            return None
        raise ConfigError(f"{written} = {format_value(value)} ({origin}): {written} is a section, not a value")
    prefix, _, name = written.rpartition(".")
    # An alias is accepted at the top level and inside any section, e.g. [model] hidden_dim.
    if name in ALIASES and prefix in sections():
        return ALIASES[name]
    for leaf in leaves():
        if written.startswith(leaf + "."):
            raise ConfigError(f"{written} ({origin}): {leaf} is a value, not a section")
    raise ConfigError(f"{written} = {format_value(value)} ({origin}): unknown key; {_advice(written, prefix)}")


def _advice(written: str, prefix: str) -> str:
    if written == "base":
        return "a file names its base; here, name it with --preset"
    if suggestion := closest_key(written):
        return f"did you mean {suggestion}?"
    if prefix in sections():
        names = ", ".join(sections()[prefix].model_fields)
        return f"keys of [{prefix}]: {names}" if prefix else f"sections: {names}"
    return "sections: " + ", ".join(name for name in sections() if name)


def _check_kind(key: str, written: str, value: object, origin: str) -> None:
    """Refuse what pydantic would coerce ("12" to 12, 1 to true) or explain badly."""
    kind, accepted = kind_of(value), accepted_kinds(key)
    if is_literal(key) or kind in accepted:
        return
    if isinstance(value, float) and value.is_integer() and "integer" in accepted:
        return
    wanted = " or ".join(sorted(accepted - {"none"} - ({"integer"} if "number" in accepted else set())))
    article = "an" if wanted[0] in "aeiou" else "a"
    found = "none" if kind == "none" else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    raise ConfigError(f"{written} = {format_value(value)} ({origin}): must be {article} {wanted}, not {found}")
