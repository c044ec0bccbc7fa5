"""Rewrites every measured number in README.md and docs/ from the result files.

    python benchmarks/update_figures.py [--check]      # or: make figures

A figure is a Markdown link. What it shows is the number and its unit; its target is the result file, relative to the
page; its title says which number of that file it is, its parts separated by " | " (written " \\| " inside a table):

    [1.61 ×](benchmarks/results/tokenize.json "CASE | METRIC | ratio | PEER")
    [0.99](benchmarks/results/recipe.json "claim | ID | measured")

or, so that a row of a table stays readable, a reference with its target at the end of the page:

    [1.61 ×][tokenize-1]
    [tokenize-1]: benchmarks/results/tokenize.json "CASE | METRIC | ratio | PEER"

On a line longer than LONGEST_LINE every figure becomes such a reference by itself.

The third part is `value`, `ratio`, `low` or `high` (the ends of the spread) of a result, or `measured`, `low` or
`high` (of the interval) of a claim. PEER is needed only where several results share case and metric. The unit and the
number of decimals are the author's and stay; the unit must be the file's, with another SI prefix if one likes, % for a
share, × for a ratio, or nothing where a table names it. Code and HTML comments are left alone. Knows the form of
`nanochat_cli.report.result_file` and imports nothing of it, so that it runs without an installation.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LONGEST_LINE = 400
"""Characters of a line of a page."""

_RESULT_TARGET = r"[^()\s]*benchmarks/results/[^()\s]+\.json"
_FIGURE = re.compile(
    rf'\[(?P<number>-?\d[\d,]*(?:\.\d+)?)(?P<unit>[^\]\n]*)\]\((?P<target>{_RESULT_TARGET}) "(?P<title>[^"\n]*)"\)'
)
_TITLED_LINK = re.compile(rf'\({_RESULT_TARGET}\s+"')
_REFERENCE = re.compile(r"\[(?P<shown>[^\[\]\n]*)\]\[(?P<label>[^\[\]\n]+)\]")
_SHOWN = re.compile(r"(?P<number>-?\d[\d,]*(?:\.\d+)?)(?P<unit>.*)")
_DEFINITION = re.compile(
    rf'^\[(?P<label>[^\[\]\n]+)\]: (?P<target>{_RESULT_TARGET}) "(?P<title>[^"\n]*)"$', re.MULTILINE
)
_OPAQUE = re.compile(
    r"^ *(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^ *(?P=fence) *$"
    r"|<!--.*?-->"
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)
_PREFIXES = {"": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SYNONYMS = {"bits per byte": "bits/byte", "bpb": "bits/byte", "tok/s": "tokens/s", "tokens per second": "tokens/s"}
_SYNONYMS |= {"seconds": "s"}


class FigureError(ValueError):
    """A figure that names no number, or not the one that it shows; one line that says what to do."""


@dataclass(frozen=True)
class Figure:
    """One link: what it shows and where it points. start: its place in the page."""

    page: Path
    start: int
    line: int
    number: str
    unit: str
    target: str
    title: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def pages(root: Path = ROOT) -> list[Path]:
    """README.md, the other pages beside it, and every page under docs/."""
    readme = root / "README.md"
    return [readme, *sorted(set(root.glob("*.md")) - {readme}), *sorted((root / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    """The text with fenced blocks, inline code and HTML comments blanked, every other character in its place."""
    return _OPAQUE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def without_figures(text: str) -> str:
    """The text, its code blanked already, with figures and the targets of references left out."""
    labels = {match["label"] for match in _DEFINITION.finditer(text)}
    text = _DEFINITION.sub("", _FIGURE.sub(" ", text))
    return _REFERENCE.sub(lambda match: " " if match["label"] in labels else match[0], text)


def figures(page: Path, text: str) -> list[Figure]:
    """The figures of a page, in its order. Raises FigureError for a link to a number of a file that is no figure."""
    visible = without_code(text)
    found = [
        Figure(page, match.start(), _line(visible, match), *_parts(match), match["target"], _title(match))
        for match in _FIGURE.finditer(visible)
    ]
    if len(found) != len(_TITLED_LINK.findall(visible)):
        raise FigureError(f'{page.name}: a link to a result file with a title must read [NUMBER UNIT](FILE "TITLE")')
    return sorted([*found, *_references(page, visible)], key=lambda figure: figure.start)


def _references(page: Path, visible: str) -> Iterator[Figure]:
    """Figures whose target stands elsewhere on the page; each target is defined once, and used."""
    definitions: dict[str, re.Match[str]] = {}
    for match in _DEFINITION.finditer(visible):
        if definitions.setdefault(match["label"], match) is not match:
            raise FigureError(f"{page.name}:{_line(visible, match)}: [{match['label']}] is defined twice")
    used = set()
    for match in _REFERENCE.finditer(visible):
        where, number = f"{page.name}:{_line(visible, match)}", _SHOWN.fullmatch(match["shown"])
        definition = definitions.get(match["label"])
        if definition is None and number is None:
            continue  # no figure: a link of another kind
        if definition is None:
            raise FigureError(
                f"{where}: [{match['label']}] is not defined: write its result file at the end of the page"
            )
        if number is None:
            raise FigureError(f"{where}: a figure must read [NUMBER UNIT][{match['label']}]")
        used.add(match["label"])
        target, title = definition["target"], _title(definition)
        yield Figure(page, match.start(), _line(visible, match), *_parts(number), target, title)
    if unused := sorted(definitions.keys() - used):
        raise FigureError(f"{page.name}: [{unused[0]}] is defined and nowhere shown: remove it")


def shortened(text: str) -> str:
    """The page with every figure of a line longer than LONGEST_LINE as a reference, its target at the end.

    Targets that no figure refers to any more are left out.
    """
    used = {match["label"] for match in _REFERENCE.finditer(without_code(text))}
    text = re.sub(
        rf"{_DEFINITION.pattern}\n?", lambda match: match[0] * (match["label"] in used), text, flags=re.MULTILINE
    )
    definitions = {(match["target"], _title(match)): match["label"] for match in _DEFINITION.finditer(text)}
    old, taken = len(definitions), set(definitions.values())

    def reference(match: re.Match[str]) -> str:
        key = match["target"], _title(match)
        if key not in definitions:
            name = match["target"].partition("benchmarks/results/")[2].removesuffix(".json").replace("/", "-")
            definitions[key] = next(label for n in count(1) if (label := f"{name}-{n}") not in taken)
            taken.add(definitions[key])
        return f"[{match['number']}{match['unit']}][{definitions[key]}]"

    lines = text.splitlines()
    for number, visible in enumerate(without_code(text).splitlines()):
        if len(lines[number]) > LONGEST_LINE:
            shorter = [(match, reference(match)) for match in _FIGURE.finditer(visible)]
            for match, short in reversed(shorter):
                lines[number] = lines[number][: match.start()] + short + lines[number][match.end() :]
    new = [f'[{label}]: {target} "{title}"' for (target, title), label in list(definitions.items())[old:]]
    gap = [""] if new and not _DEFINITION.fullmatch(lines[-1]) else []
    return "\n".join([*lines, *gap, *new]) + "\n"


def _line(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1


def _parts(match: re.Match[str]) -> tuple[str, str]:
    return match["number"], match["unit"].strip()


def _title(match: re.Match[str]) -> str:
    return match["title"].replace(r"\|", "|")


def shown(figure: Figure) -> str:
    """What the figure must show: the number of the file in its unit and with its decimals. Raises FigureError."""
    path = (figure.page.parent / figure.target).resolve()
    try:
        document = _read(path)
    except (OSError, ValueError) as error:
        raise FigureError(f"{figure.where}: {figure.target} cannot be read ({error})") from error
    try:
        value, unit = look_up(document, figure.title)
        value *= factor(unit, figure.unit)
    except FigureError as error:
        raise FigureError(f"{figure.where}: {figure.target}: {error}") from None
    decimals = len(figure.number.partition(".")[2])
    text = f"{value:,.{decimals}f}" if "," in figure.number else f"{value:.{decimals}f}"
    return f"{text} {figure.unit}".rstrip()


def look_up(document: dict[str, Any], title: str) -> tuple[float, str]:
    """The number that a title names, and its unit (× for a ratio or a claim). Raises FigureError."""
    parts = [part.strip() for part in title.split("|")]
    if len(parts) == 3 and parts[0] == "claim":
        return _of_claim(document, parts[1], parts[2]), "×"
    if len(parts) not in (3, 4):
        raise FigureError(f"the title {title!r} is not CASE | METRIC | FIELD, with | PEER where that is not unique")
    case, metric, field, *peer = parts
    matching = [
        result
        for result in document["results"]
        if result["case"] == case and result["metric"] == metric and (not peer or result["peer"] == peer[0])
    ]
    if len(matching) != 1:
        known = {f"{r['case']} | {r['metric']} | {field} | {r['peer']}" for r in document["results"]}
        near = "; ".join(difflib.get_close_matches(title, known, n=5, cutoff=0.0))
        raise FigureError(f"{len(matching)} results are called {title!r}; it has {len(known)}, the nearest: {near}")
    (result,) = matching
    number = {"value": result["value"], "ratio": result["ratio"], **_ends(result["spread"])}.get(field)
    if number is None:
        raise FigureError(f"{title!r}: this result has no {field!r}")
    return float(number), "×" if field == "ratio" else result["unit"]


def factor(unit: str, wanted: str) -> float:
    """What a number in `unit` is multiplied with to stand before `wanted`. Raises FigureError."""
    if wanted == "%" and unit in ("share", "×"):
        return 100.0
    unit, wanted = _SYNONYMS.get(unit, unit), _SYNONYMS.get(wanted, wanted)
    if wanted in ("", unit):
        return 1.0
    for from_prefix, from_factor in _PREFIXES.items():
        for to_prefix, to_factor in _PREFIXES.items():
            base = unit.removeprefix(from_prefix)
            if unit.startswith(from_prefix) and base and wanted in (to_prefix + base, f"{to_prefix} {base}"):
                return from_factor / to_factor
    raise FigureError(f"it is measured in {unit!r} and shown in {wanted!r}")


def updated(page: Path, text: str) -> str:
    """The page with every figure as `shown`. Raises FigureError."""
    for figure in reversed(figures(page, text)):
        end = text.index("]", figure.start)
        text = f"{text[: figure.start]}[{shown(figure)}{text[end:]}"
    return text


def _of_claim(document: dict[str, Any], name: str, field: str) -> float:
    claim = next((claim for claim in document["claims"] if claim["id"] == name), None)
    if claim is None:
        raise FigureError(f"there is no claim {name!r}; it has: {', '.join(c['id'] for c in document['claims'])}")
    if field == "measured" and (number := re.match(r"(-?\d+(?:\.\d+)?)( %)?", claim["measured"])):
        return float(number[1]) / (100 if number[2] else 1)
    end = _ends(claim["interval"]).get(field)
    if end is None:
        raise FigureError(f"claim {name!r} has no number {field!r}")
    return float(end)


def _ends(interval: list[float] | None) -> dict[str, float]:
    return {} if interval is None else dict(zip(("low", "high"), interval, strict=True))


@cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _problems(check: bool) -> Iterator[str]:
    """Update every page (or only compare); one line for each that cannot be, or is not, up to date."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = updated(page, shortened(text))
        except FigureError as error:
            yield str(error)
            continue
        if new != text and check:
            yield f"{page.name}: figures differ from the result files, or a line is too long; run make figures"
        elif new != text:
            page.write_text(new, encoding="utf-8")
            print(f"{page.relative_to(ROOT)}: updated")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when something would change")
    problems = list(_problems(parser.parse_args().check))
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
