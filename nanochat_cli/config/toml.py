"""Reading a TOML file with errors that name the file and the line."""

import tomllib
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from nanochat_cli.errors import ConfigError
from nanochat_cli.nesting import require_shallow


def read_toml(path: Path, *, what: str) -> dict[str, object]:
    """The tables of a TOML file as plain dicts. Raises ConfigError if it cannot be read or parsed."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a {what} is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {what}: {error.strerror}") from None
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from None


def parse_toml(text: str) -> dict[str, object]:
    """TOML text as plain dicts. Raises ValueError if it is invalid or nested deeper than `nesting` allows."""
    try:
        found = _parse(text)
    except TOMLKitError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("nested too deep") from None
    require_shallow(found)
    return found


def _parse(text: str) -> dict[str, object]:
    """By the standard library, twenty times as fast as tomlkit, whose words for what is wrong are clearer."""
    try:
        return tomllib.loads(text)
    except ValueError:
        return tomlkit.parse(text).unwrap()
