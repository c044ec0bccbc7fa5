"""The JSON schema of a configuration file, by which editors complete and check keys."""

from typing import Any

from nanochat_cli.config import presets
from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.schema import Config

SCHEMA_FILE = "config.schema.json"
"""Its name beside the configuration of a run, whose first line refers to it."""


def json_schema() -> dict[str, Any]:
    """A schema of draft 2020-12: every section and key, `base`, and the flat names of other programs.

    It knows each key by itself; what keys must agree on is checked when a configuration is resolved. TOML has no null,
    so a key that may be none is one that may be left out.
    """
    schema = _without_null(Config.model_json_schema())
    flat = {name: _leaf(schema, key) | {"description": f"the same as {key}"} for name, key in ALIASES.items()}
    base = {
        "type": "string",
        "description": "the preset that this file changes: its name, or the path of a TOML file",
        "examples": presets.names(),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Configuration of nanochat train",
        "properties": {"base": base, **schema["properties"], **flat},
    }


def _leaf(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """The schema of a dotted key."""
    found = schema
    for part in key.split("."):
        found = found["properties"][part]
        if "$ref" in found:
            found = schema["$defs"][found["$ref"].removeprefix("#/$defs/")]
    return found


def _without_null(node: Any) -> Any:
    """The schema without the type null, and without defaults of null."""
    if isinstance(node, list):
        return [_without_null(part) for part in node if part != {"type": "null"}]
    if not isinstance(node, dict):
        return node
    kept = {key: _without_null(part) for key, part in node.items() if not (key == "default" and part is None)}
    if len(kept.get("anyOf", ())) == 1:
        kept |= kept.pop("anyOf")[0]
    return kept
