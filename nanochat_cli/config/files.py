"""Reading a TOML file with errors that name the file and the line."""

from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from nanochat_cli.errors import ConfigError


def read_toml(path: Path, *, what: str) -> dict[str, object]:
    """The tables of a TOML file as plain dicts. Raises ConfigError when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such {what} file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}); a {what} is a TOML file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the {what}: {error.strerror}") from None
    try:
        return tomlkit.parse(text).unwrap()
    except TOMLKitError as error:
        raise ConfigError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from None
