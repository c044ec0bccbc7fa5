"""Lines of documents to complete, and how close an answer is. Knows text only.

A task is cut where an editor asks: at the end of a line for the next one, before a blank inside a line for its rest.
With the pre-tokenizer gpt-2 tokens end at both; the other two join punctuation and the line break after it.
"""

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["next line", "rest of line"]
KINDS: tuple[Kind, Kind] = ("next line", "rest of line")
FAR = 20_000
"""Characters of a document that are kept on each side of the place."""
_INNER_BLANK = re.compile(r"(?<=\S) (?=\S)")
_WORDS = re.compile(r"\w")


@dataclass(frozen=True)
class Task:
    """truth: what stands between prefix and suffix, up to the end of its line; a next line with the break before it."""

    kind: Kind
    language: str
    prefix: str
    truth: str
    suffix: str


def completion_tasks(documents: Iterable[tuple[str, str]], limit: int) -> list[Task]:
    """At most `limit` tasks of each kind and language in these (language, text).

    They are chosen by hashes of document and line, so that the same documents give the same ones.
    """
    found: dict[tuple[Kind, str], list[tuple[bytes, Task]]] = {}
    for language, text in documents:
        name = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        here: dict[Kind, list[tuple[bytes, int, int]]] = {kind: [] for kind in KINDS}
        for kind, start, stop in _places(text):
            key = hashlib.blake2b(f"{kind} {start}".encode(), key=name, digest_size=16).digest()
            here[kind].append((key, start, stop))
        for kind, places in here.items():
            tasks = [
                (
                    key,
                    Task(kind, language, text[max(0, start - FAR) : start], text[start:stop], text[stop : stop + FAR]),
                )
                for key, start, stop in heapq.nsmallest(limit, places)
            ]
            group = [*found.get((kind, language), ()), *tasks]
            found[kind, language] = heapq.nsmallest(limit, group, key=lambda pair: pair[0])
    return [task for group in sorted(found) for _, task in found[group]]


def answer(kind: Kind, text: str) -> str:
    """The part of a completion that is compared: of the next line the first one that is not blank."""
    return (text.lstrip() if kind == "next line" else text).split("\n", 1)[0].strip()


def is_answered(kind: Kind, text: str) -> bool:
    """Whether a longer completion would have the same answer."""
    return "\n" in (text.lstrip() if kind == "next line" else text)


def edit_similarity(one: str, other: str) -> float:
    """1 − Levenshtein distance / length of the longer text: 1 if they are equal, 0 if nothing is common."""
    if one == other:
        return 1.0
    above = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        left = [row]
        for column, its in enumerate(other, 1):
            left.append(min(left[-1] + 1, above[column] + 1, above[column - 1] + (letter != its)))
        above = left
    return 1 - above[-1] / max(len(one), len(other))


def _places(text: str) -> Iterator[tuple[Kind, int, int]]:
    """(kind, start, stop) of what can be asked; each line with a word in it gives at most one of each kind."""
    before = None  # the end of the line above, unless that is blank
    start = 0
    for line in text.split("\n"):
        stop = start + len(line)
        if before is not None and _WORDS.search(line):
            yield "next line", before, stop
        blanks = [match.start() for match in _INNER_BLANK.finditer(line)]
        if blanks and _WORDS.search(line, middle := blanks[len(blanks) // 2]):
            yield "rest of line", start + middle, stop
        before = stop if line.strip() else None
        start = stop + 1
