"""`--set a.b=c`: one assignment on the command line as a table.

The value is read as TOML, or as a string if it is not valid TOML, so that `--set optim.schedule=cosine` needs no
quotes in the shell. A bare `none` unsets a key that may be absent.
"""

import re

from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.keys import accepted_kinds, is_literal, leaves, literal_values
from nanochat_cli.config.toml import parse_toml
from nanochat_cli.errors import ConfigError

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")


def parse_override(text: str) -> dict[str, object]:
    """`"model.dim=512"` -> `{"model.dim": 512}`. Raises ConfigError if `text` is not an assignment."""
    key, separator, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not separator:
        raise ConfigError(f"--set {text}: write KEY=VALUE, for example --set train.total_steps=100")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"--set {text}: {key!r} is not a key; write it as section.name")
    parsed = _parse_value(value)
    target = key if key in leaves() else ALIASES.get(key, "")
    if parsed is None and target in leaves() and is_literal(target) and "none" in literal_values(target):
        return {key: "none"}  # one of its values, and it cannot be absent
    if target in leaves() and accepted_kinds(target) <= {"string", "none"} and parsed is not None:
        # 2024 or true is a name where the key takes only text.
        parsed = parsed if isinstance(parsed, str) else value
    return {key: parsed}


def _parse_value(value: str) -> object:
    if value == "none":
        return None
    try:
        document = parse_toml(f"value = {value}\n")
    except ValueError:
        return value
    return document["value"] if len(document) == 1 else value
