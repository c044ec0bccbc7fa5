"""The sources of a mixture as they are written: NAME=SOURCE:WEIGHT."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MOST_PARTS = 64
_PART = re.compile(r"(?P<name>[A-Za-z][A-Za-z0-9_-]*)=(?P<source>.+?)(?::(?P<weight>\d+(?:\.\d+)?))?", re.DOTALL)


class Part(NamedTuple):
    """One source of a mixture."""

    name: str
    source: str
    weight: float

    def __str__(self) -> str:
        return f"{self.name}={self.source}:{self.weight:g}"


def is_part(text: str) -> bool:
    """Whether a source on the command line is written as that of a mixture."""
    return _PART.fullmatch(text) is not None


def parts_of(texts: Iterable[str]) -> list[Part]:
    """The sources of a mixture; without a weight it is 1. Raises ValueError, in words that follow a key."""
    parts: dict[str, Part] = {}
    for text in texts:
        found = _PART.fullmatch(text)
        if found is None:
            raise ValueError(f"must name each of several sources as NAME=SOURCE or NAME=SOURCE:WEIGHT, not {text!r}")
        part = Part(found["name"], found["source"], float(found["weight"] or 1))
        if part.weight == 0:
            raise ValueError(f"must have weights above 0; leave out {part.name}")
        if part.name in parts:
            raise ValueError(f"must have different names; {part.name} is given twice")
        parts[part.name] = part
    if len(parts) > MOST_PARTS:
        raise ValueError(f"must name at most {MOST_PARTS} sources, not {len(parts)}")
    return list(parts.values())


def without_folders(text: str) -> str:
    """A source with the name of a file or folder in place of a path from the root or upwards.

    For what others read: a path tells them names of persons and of projects.
    """
    path = Path(text)
    return path.name if path.is_absolute() or ".." in path.parts else text


def parts_without_folders(text: str) -> str:
    """The same for several sources of a mixture in one text, or for a single source."""
    texts = text.split(", ")
    if not all(map(is_part, texts)):
        return without_folders(text)
    return ", ".join(str(part._replace(source=without_folders(part.source))) for part in parts_of(texts))
