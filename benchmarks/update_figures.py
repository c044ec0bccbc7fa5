"""Rewrites every measured number in README.md and docs/ from the result files.

    python benchmarks/update_figures.py [--check]

A figure is a Markdown link. What it shows is the number and its unit; its target is the result file, relative to the
page; its title says which number of that file it is, its parts separated by " | " (written " \\| " inside a table):

    [1.61 ×](benchmarks/results/tokenize.json "CASE | METRIC | ratio | PEER")
    [0.99](benchmarks/results/recipe.json "claim | ID | measured")

The third part is `value`, `ratio`, `low` or `high` (the ends of the spread) of a result, or `measured`, `low` or
`high` (of the interval) of a claim. PEER is needed only where several results share case and metric. The unit and the
number of decimals are the author's and stay; the unit must be the file's, with another SI prefix if one likes, % for a
share, × for a ratio, or nothing where a table names it. Code and HTML comments are left alone. Knows the form of
`nanochat_cli.bench.result_file` and imports nothing of it, so that it runs without an installation.
"""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_RESULT_TARGET = r"[^()\s]*benchmarks/results/[^()\s]+\.json"
_FIGURE = re.compile(
    rf'\[(?P<number>-?\d[\d,]*(?:\.\d+)?)(?P<unit>[^\]\n]*)\]\((?P<target>{_RESULT_TARGET}) "(?P<title>[^"\n]*)"\)'
)
_TITLED_LINK = re.compile(rf'\({_RESULT_TARGET}\s+"')
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
    """README.md and every page under docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    """The text with fenced blocks, inline code and HTML comments blanked, every other character in its place."""
    return _OPAQUE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def figures(page: Path, text: str) -> list[Figure]:
    """The figures of a page. Raises FigureError for a titled link to a result file that is no figure."""
    visible = without_code(text)
    found = [
        Figure(
            page,
            match.start(),
            visible.count("\n", 0, match.start()) + 1,
            match["number"],
            match["unit"].strip(),
            match["target"],
            match["title"].replace(r"\|", "|"),
        )
        for match in _FIGURE.finditer(visible)
    ]
    if len(found) != len(_TITLED_LINK.findall(visible)):
        raise FigureError(f'{page.name}: a link to a result file with a title must read [NUMBER UNIT](FILE "TITLE")')
    return found


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
    if field == "measured" and (number := re.match(r"-?\d+(\.\d+)?", claim["measured"])):
        return float(number[0])
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
            new = updated(page, text)
        except FigureError as error:
            yield str(error)
            continue
        if new != text and check:
            yield f"{page.name}: figures differ from the result files; run python benchmarks/update_figures.py"
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
