"""The keys of the schema by dotted name: which exist, what each takes, and which is closest to a typo.

Derived from `config.schema` by introspection, so that a new field is known here as soon as it is declared.
"""

import difflib
import json
import types
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nanochat_cli.config.aliases import ALIASES, KNOWN_ELSEWHERE
from nanochat_cli.config.schema import Config


@cache
def sections() -> dict[str, type[BaseModel]]:
    """Dotted section name -> its model; the root is the empty name."""
    found: dict[str, type[BaseModel]] = {}

    def visit(prefix: str, model: type[BaseModel]) -> None:
        found[prefix] = model
        for name, field in model.model_fields.items():
            if (inner := _section_type(field)) is not None:
                visit(join(prefix, name), inner)

    visit("", Config)
    return found


@cache
def leaves() -> dict[str, FieldInfo]:
    """Dotted key -> field, for every value that can be set, in the order of the schema."""
    return {
        join(prefix, name): field
        for prefix, model in sections().items()
        for name, field in model.model_fields.items()
        if _section_type(field) is None
    }


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def closest_key(key: str) -> str | None:
    """The valid key that `key` most likely stands for, if any is close.

    Tried in this order: the name in another program, the same name in another section, a similar name in the section
    as written, a similar dotted key, a similar name in any section.
    """
    section, _, name = key.rpartition(".")
    by_name: dict[str, str] = {}
    for dotted in leaves():
        by_name.setdefault(dotted.rpartition(".")[2], dotted)
    if known := KNOWN_ELSEWHERE.get(name) or by_name.get(name) or _of_a_section(name):
        return known
    if section in sections() and (near := _nearest(name, sections()[section].model_fields)):
        return join(section, near)
    spelled = difflib.get_close_matches(key, [*leaves(), *ALIASES, *KNOWN_ELSEWHERE], n=1, cutoff=0.7)
    if spelled:
        return KNOWN_ELSEWHERE.get(spelled[0], spelled[0])
    near = _nearest(name, by_name)
    return by_name[near] if near else None


def _of_a_section(name: str) -> str | None:
    """`use_fire` or `fire_enabled` -> `fire.enabled`; `galore_scale` -> `optim.galore.scale`.

    The first key of a section without `enabled` is its switch.
    """
    by_part = {dotted.rpartition(".")[2]: dotted for dotted in sections() if dotted}
    for part, dotted in by_part.items():
        fields = list(sections()[dotted].model_fields)
        if name in (f"use_{part}", f"enable_{part}", f"{part}_enabled", f"{part}_enable"):
            return join(dotted, "enabled" if "enabled" in fields else fields[0])
        if name.startswith(f"{part}_") and (rest := name.removeprefix(f"{part}_")) in fields:
            return join(dotted, rest)
    return None


def _nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that `name`, or one word of it, resembles most (`stpes`: `total_steps`), if any is close."""

    def similarity(candidate: str) -> float:
        words = candidate.split("_") if "_" in candidate else []
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        return max([whole, *(0.95 * difflib.SequenceMatcher(None, name, word).ratio() for word in words)])

    best = max(candidates, key=similarity, default=None)
    return best if best is not None and similarity(best) >= 0.7 else None


def accepted_kinds(key: str) -> frozenset[str]:
    """Kinds of TOML value that `key` takes: a subset of integer, number, boolean, string, array, none."""
    return _kinds(leaves()[key].annotation)


def is_literal(key: str) -> bool:
    """Whether `key` takes one of a fixed list of values."""
    annotation = leaves()[key].annotation
    return get_origin(annotation) is Literal


def literal_values(key: str) -> tuple[object, ...]:
    """The fixed list of values that `key` takes."""
    return get_args(leaves()[key].annotation)


def tuple_length(key: str) -> int:
    """The number of values in the array `key`."""
    return len(get_args(leaves()[key].annotation))


def kind_of(value: object) -> str:
    """The kind of a TOML value, in TOML's own terms."""
    if value is None:
        return "none"
    for python_type, kind in _KIND_OF_TYPE.items():
        if isinstance(value, python_type):
            return kind
    return "table" if isinstance(value, dict) else type(value).__name__


def format_value(value: object) -> str:
    """`value` as it would be written in TOML, shortened to fit a line."""
    if value is None:
        return "none"
    try:
        text = json.dumps(value, ensure_ascii=False)
    except TypeError:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


# bool before int: a bool is an int in Python, not in TOML.
_KIND_OF_TYPE: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    Path: "string",
    list: "array",
    tuple: "array",
}


def _section_type(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _kinds(annotation: Any) -> frozenset[str]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin is Literal:
        return frozenset(kind_of(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return frozenset().union(*(_kinds(part) for part in get_args(annotation)))
    if annotation is types.NoneType:
        return frozenset({"none"})
    kind = _KIND_OF_TYPE[origin or annotation]
    return frozenset({"integer", "number"}) if kind == "number" else frozenset({kind})
