"""What the tests of the documentation read in a Markdown page: prose, fenced blocks, tables, links, headings."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.update_figures import ROOT, pages, without_code, without_figures

PAGES = pages()
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]

_FENCE = re.compile(r"^ *(`{3,}|~{3,})([^\n]*)\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r'!?\[[^\]]*\]\((?P<target>[^()\s]+)(?:\s+"[^"\n]*")?\)')
_TARGET = re.compile(r"^\[[^\]\n]+\]: (?P<target>\S+)", re.MULTILINE)
_TABLE = re.compile(r"(?:^\|[^\n]*\|\n){2,}", re.MULTILINE)


class Block(NamedTuple):
    language: str
    content: str


class Table(NamedTuple):
    header: list[str]
    rows: list[list[str]]


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def having(found: Callable[[str], object]) -> list[str]:
    """The pages in which `found` finds something: those that a test has to look at."""
    return [name for name, page in zip(NAMES, PAGES, strict=True) if found(read(page))]


def blocks(text: str) -> list[Block]:
    """Fenced blocks that a reader sees."""
    return [Block(match[2].strip(), match[3]) for match in _FENCE.finditer(_COMMENT.sub("", text))]


def tables(text: str) -> list[Table]:
    """Pipe tables; a cell is its source without the spaces around it."""
    found = []
    for match in _TABLE.finditer(_COMMENT.sub("", _FENCE.sub("", text)) + "\n"):
        header, _, *rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]] for line in match[0].splitlines()
        ]
        found.append(Table(header, rows))
    return found


def links(text: str) -> Iterator[str]:
    """Targets of links and pictures outside code, and those at the foot of a page."""
    text = without_code(text)
    return (match["target"] for pattern in (_LINK, _TARGET) for match in pattern.finditer(text))


def anchors(text: str) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def prose(text: str) -> str:
    """What a reader takes for the authors' own words: no code, figures, link targets or configuration tables."""
    text = without_figures(text)
    text = re.sub(r"\]\([^()\s]+\)", "]", text)
    return _TABLE.sub(lambda match: "\n" if re.match(r"\| *key *\|", match[0]) else match[0], text)
