"""Writes the tables of configuration keys in docs/ from the schema.

    python -m benchmarks.update_keys [--check]      # or: make keys [CHECK=1]

A table stands between two markers. The first one names sections, which stand for their own keys without those of inner
sections, or single keys:

    <!-- keys: model.moe optim.eight_bit -->

    (written by this script)

    <!-- end -->

Defaults, values and meanings are those of `nanochat_cli.config.sections`; the default `none` is "not set".
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from benchmarks.update_figures import pages
from nanochat_cli.config.keys import join, leaves, sections

_TABLE = re.compile(r"^<!-- keys: (?P<names>.*?) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
_KINDS = {"string": "text", "array": "array of "}


def rendered(text: str) -> str:
    """A page with its tables of keys as the schema has them. Raises ValueError for a name that does not exist."""
    return _TABLE.sub(lambda m: f"<!-- keys: {m['names']} -->\n\n{table(m['names'].split())}\n<!-- end -->", text)


def table(names: Iterable[str]) -> str:
    """The rows of these sections and keys, in their order, as Markdown."""
    lines = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
    for key in (key for name in names for key in _keys(name)):
        section, _, field = key.rpartition(".")
        schema = _properties(section)[field]
        default = "none" if schema["default"] is None else json.dumps(schema["default"])
        meaning = schema["description"].replace("|", r"\|")
        lines.append(f"| `{key}` | `{default}` | {_values(schema)} | {meaning} |")
    return "\n".join(lines) + "\n"


def _keys(name: str) -> list[str]:
    if name in leaves():
        return [name]
    if name not in sections():
        raise ValueError(f"{name}: no such section or key")
    return [key for field in sections()[name].model_fields if (key := join(name, field)) in leaves()]


@cache
def _properties(section: str) -> dict[str, Any]:
    return sections()[section].model_json_schema()["properties"]


def _values(schema: dict[str, Any]) -> str:
    """What a key takes: a list of values, or a kind and its bounds. `none` is left out."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"] if one != {"type": "null"})
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    kind = schema.get("format") or _KINDS.get(schema["type"], schema["type"])
    if schema["type"] == "array":
        kind += _values(schema.get("items") or schema["prefixItems"][0])
    bounds = ", ".join(f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema)
    return f"{kind} {bounds}".rstrip()


def _problems(check: bool) -> Iterator[str]:
    """Update every page, or only compare; one line for each that cannot be, or is not, up to date."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = rendered(text)
        except ValueError as error:
            yield f"{page.name}: {error}"
            continue
        if new != text and check:
            yield f"{page.name}: tables of keys differ from the schema; run make keys"
        elif new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page}: updated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when something would change")
    problems = list(_problems(parser.parse_args().check))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
