"""Writes every measured number of README.md and docs/ anew from the files in benchmarks/results/.

    python benchmarks/update_figures.py [--check]      # or: make figures [CHECK=1]

In a sentence a number is a reference, and its definition at the foot of the page says which number of a file it is:

    It encodes [1.64 MB/s][encoding], [1.61 ×][encoding-ratio] the rate of the library.

    [encoding]: benchmarks/results/tokenize.json "CASE | METRIC | value | PEER"

A table stands between two markers, and the first one describes it (TOML; the first line of `rows` names the fields):

    <!-- table: collider.json
    rows = '''
    width | sparsity | case
    512   | 0.2      | width 512, 20% filtered
    '''
    [columns]
    "width" = "{width}"
    "backward, none / filtered" = "[0.00 ×]({case} | backward_ms | ratio | nothing filtered)"
    -->

    (written by this script)

    <!-- end -->

A cell is text in which {FIELD} is the row's, [FORM](TITLE) a number, and [](TITLE) a text of the file. Other keys of
the description are fields of every row, and {device} is the machine that the file names. A title that begins with
"other.json | " is one of that file. A cell stays empty when the file has no such number; a row or a column without any
is an error.

A title is CASE | METRIC | FIELD, with | PEER where several results share case and metric. FIELD is `value`, `ratio`,
`low` or `high` (the ends of the spread); of a claim (claim | ID | FIELD) it is `measured`, `low` or `high`, or as a
text any of its words. Unit and decimals are the author's: those of the number that stands there, or of FORM, such as
"0.00 ×" or "0,000 tokens/s". The unit must be the file's, with another SI prefix if one likes, % for a share, × for a
ratio, or nothing where a heading names it. Code is left alone. Knows the form of `nanochat_cli.report.result_file` and
imports nothing of it, so that it runs without an installation.
"""

import argparse
import difflib
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

_TARGET = r"[^()\s]*benchmarks/results/[^()\s]+\.json"
_REFERENCE = re.compile(r"\[(?P<shown>[^\[\]\n]*)\]\[(?P<label>[^\[\]\n]+)\]")
_DEFINITION = re.compile(rf'^\[(?P<label>[^\[\]\n]+)\]: (?P<target>{_TARGET}) "(?P<title>[^"\n]*)"$', re.MULTILINE)
_INLINE = re.compile(rf'\]\({_TARGET}\s+"')
_NUMBER = re.compile(r"(?P<number>-?\d[\d,]*(?:\.\d+)?)(?P<unit>.*)")
_FENCED = re.compile(r"^ *(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^ *(?P=fence) *$", re.MULTILINE | re.DOTALL)
_OPAQUE = re.compile(
    rf"{_FENCED.pattern}|<!--.*?-->|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)",
    re.MULTILINE | re.DOTALL,
)
_TABLE = re.compile(
    r"^<!-- table: (?P<file>\S+)\n(?P<description>.*?)^-->\n(?P<body>.*?)^<!-- end -->$", re.MULTILINE | re.DOTALL
)
_FIELD = re.compile(r"\{([^{}]+)\}")
_IN_CELL = re.compile(r"\[(?P<form>[^\[\]]*)\]\((?P<title>(?:[^()]|\([^()]*\))*)\)")
_PREFIXES = {"": 1.0, "µ": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SYNONYMS = {"bits per byte": "bits/byte", "bpb": "bits/byte", "tok/s": "tokens/s", "tokens per second": "tokens/s"}
_SYNONYMS |= {"seconds": "s"}


class FigureError(ValueError):
    """A figure that names no number, or not the one that it shows; one line that says what to do."""


class Missing(FigureError):
    """The file holds no such number."""


@dataclass(frozen=True)
class Figure:
    """A number in a sentence: what is shown, where that begins in the page, and which number of which file it is."""

    where: str
    start: int
    shown: str
    target: str
    title: str


def pages(root: Path = ROOT) -> list[Path]:
    """README.md, the other pages beside it, and every page under docs/."""
    readme = root / "README.md"
    return [readme, *sorted(set(root.glob("*.md")) - {readme}), *sorted((root / "docs").rglob("*.md"))]


def without_code(text: str) -> str:
    """The text with fenced blocks, inline code and HTML comments blanked, every other character in its place."""
    return _OPAQUE.sub(_blank, text)


def without_figures(text: str) -> str:
    """What the authors wrote themselves: no code, no table that is written here, no figure and no definition of one."""
    text = without_code(_TABLE.sub(_blank, text))
    labels = {match["label"] for match in _DEFINITION.finditer(text)}
    return _REFERENCE.sub(lambda match: " " if match["label"] in labels else match[0], _DEFINITION.sub("", text))


def rendered(page: Path, text: str, results: Path = RESULTS) -> str:
    """The page with its figures, and its tables of files in `results`, as those files have them. Raises FigureError."""
    for figure in reversed(figures(page, text)):
        try:
            new = _written(figure.shown, page.parent / figure.target, figure.title)
        except FigureError as error:
            raise type(error)(f"{figure.where}: {figure.target}: {error}") from None
        text = text[: figure.start] + new + text[figure.start + len(figure.shown) :]
    for match in reversed(_tables(page, text)):
        try:
            body = _table(results / match["file"], text[match.start("description") : match.end("description")])
        except FigureError as error:
            raise FigureError(f"{_where(page, text, match)}: {error}") from None
        text = text[: match.start("body")] + body + text[match.end("body") :]
    return text


def figures(page: Path, text: str) -> list[Figure]:
    """The figures in the sentences of a page, in its order. Raises FigureError for one of another form."""
    visible = without_code(text)
    if match := _INLINE.search(visible):
        where = _where(page, visible, match)
        raise FigureError(f"{where}: write [NUMBER UNIT][LABEL], and file and title at the foot of the page")
    definitions: dict[str, re.Match[str]] = {}
    for match in _DEFINITION.finditer(visible):
        if definitions.setdefault(match["label"], match) is not match:
            raise FigureError(f"{_where(page, visible, match)}: [{match['label']}] is defined twice")
    found = []
    for match in _REFERENCE.finditer(visible):
        where, label, is_number = _where(page, visible, match), match["label"], _NUMBER.fullmatch(match["shown"])
        if label in definitions and not is_number:
            raise FigureError(f"{where}: a figure must read [NUMBER UNIT][{label}]")
        if label not in definitions and is_number:
            raise FigureError(f"{where}: [{label}] is not defined: write its result file at the foot of the page")
        if is_number:
            definition = definitions[label]
            found.append(Figure(where, match.start("shown"), match["shown"], definition["target"], definition["title"]))
    used = {match["label"] for match in _REFERENCE.finditer(visible)}
    if unused := sorted(definitions.keys() - used):
        raise FigureError(f"{page.name}: [{unused[0]}] is defined and nowhere shown: remove it")
    return found


def table_files(page: Path, text: str) -> set[str]:
    """Names of the result files that the tables of a page are written from, as paths below `results`."""
    names: set[str] = set()
    for match in _tables(page, text):
        beside = Path(match["file"]).parent
        found = re.findall(r"[\w./-]+\.json", match["description"])
        names |= {match["file"], *((beside / name).as_posix() for name in found)}
    return names


def _tables(page: Path, text: str) -> list[re.Match[str]]:
    visible = _FENCED.sub(_blank, text)
    found = list(_TABLE.finditer(visible))
    if len(found) != len(re.findall(r"^<!-- table\b", visible, re.MULTILINE)):
        raise FigureError(f"{page.name}: a table reads <!-- table: FILE.json, its description, -->, <!-- end -->")
    return found


def _table(file: Path, description: str) -> str:
    """What stands between the two markers."""
    try:
        fields: dict[str, Any] = {"device": "{device}"} | tomllib.loads(description)
        columns, rows = fields.pop("columns"), fields.pop("rows")
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise FigureError(f"the description of the table cannot be read: {error}") from None
    names, *lines = [[cell.strip() for cell in line.split("|")] for line in rows.strip().splitlines()]
    if wrong := next((line for line in lines if len(line) != len(names)), None):
        raise FigureError(f"the row {' | '.join(wrong)!r} does not have the fields {' | '.join(names)!r}")
    cells = [
        [_cell(file, template, fields | dict(zip(names, line, strict=True))) for template in columns.values()]
        for line in lines
    ]
    numbers = [column for column, template in enumerate(columns.values()) if _IN_CELL.search(template)]
    for line, row in zip(lines, cells, strict=True):
        if not any(row[column] for column in numbers):
            raise FigureError(f"{file.name} has no number for the row {' | '.join(line)!r}")
    for column in numbers:
        if not any(row[column] for row in cells):
            raise FigureError(f"{file.name} has no number for the column {list(columns)[column]!r}")
    rules = ["---:" if column in numbers else "---" for column in range(len(columns))]
    return "".join(["\n", *(f"| {' | '.join(line)} |\n" for line in [list(columns), rules, *cells]), "\n"])


def _cell(file: Path, template: str, fields: dict[str, Any]) -> str:
    """The text of a cell; empty when one of its numbers is not there."""

    def field(match: re.Match[str]) -> str:
        if match[1] not in fields:
            raise FigureError(f"no field is called {match[0]}; there are: {', '.join(fields)}")
        return str(fields[match[1]])

    def number(match: re.Match[str]) -> str:
        first, _, rest = match["title"].partition(" | ")
        path, title = (file.parent / first, rest) if first.endswith(".json") else (file, match["title"])
        return _written(match["form"], path, title)

    try:
        return _IN_CELL.sub(number, _FIELD.sub(field, template))
    except Missing:
        return ""


def _written(form: str, path: Path, title: str) -> str:
    """What a file says at `title`, in the unit and with the decimals of `form`; its text where that is empty."""
    try:
        document = _read(path.resolve())
    except (OSError, ValueError) as error:
        raise FigureError(f"{path.name} cannot be read ({error})") from error
    if not form:
        return _text(document, title).replace("|", r"\|")
    shape = _NUMBER.fullmatch(form)
    if shape is None:
        raise FigureError(f"{form!r} is no number with a unit")
    value, unit = look_up(document, title.replace("{device}", document["environment"].get("device", "")))
    number, wanted = shape["number"], shape["unit"].strip()
    decimals, comma = len(number.partition(".")[2]), "," if "," in number else ""
    return f"{value * factor(unit, wanted):{comma}.{decimals}f} {wanted}".rstrip()


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
        kind = FigureError if matching else Missing
        raise kind(f"{len(matching)} results are called {title!r}; it has {len(known)}, the nearest: {near}")
    (result,) = matching
    number = {"value": result["value"], "ratio": result["ratio"], **_ends(result["spread"])}.get(field)
    if number is None:
        raise Missing(f"{title!r}: this result has no {field!r}")
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


def _claim(document: dict[str, Any], name: str) -> dict[str, Any]:
    for claim in document["claims"]:
        if claim["id"] == name:
            return claim
    raise FigureError(f"there is no claim {name!r}; it has: {', '.join(claim['id'] for claim in document['claims'])}")


def _of_claim(document: dict[str, Any], name: str, field: str) -> float:
    claim = _claim(document, name)
    if field == "measured" and (number := re.match(r"(-?\d+(?:\.\d+)?)( %)?", claim["measured"])):
        return float(number[1]) / (100 if number[2] else 1)
    end = _ends(claim["interval"]).get(field)
    if end is None:
        raise Missing(f"claim {name!r} has no number {field!r}")
    return float(end)


def _text(document: dict[str, Any], title: str) -> str:
    """The words of a claim that a title names. Raises FigureError."""
    parts = title.split(" | ")
    if len(parts) != 3 or parts[0] != "claim" or not isinstance(words := _claim(document, parts[1]).get(parts[2]), str):
        raise FigureError(f"{title!r} is no text of a claim, such as claim | ID | verdict")
    return words


def _ends(interval: list[float] | None) -> dict[str, float]:
    return {} if interval is None else dict(zip(("low", "high"), interval, strict=True))


def _where(page: Path, text: str, match: re.Match[str]) -> str:
    return f"{page.name}:{text.count(chr(10), 0, match.start()) + 1}"


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


@cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _problems(check: bool) -> Iterator[str]:
    """Write every page anew (or only compare); one line for each that cannot be, or is not, up to date."""
    for page in pages():
        text = page.read_text(encoding="utf-8")
        try:
            new = rendered(page, text)
        except FigureError as error:
            yield str(error)
            continue
        if new != text and check:
            yield f"{page.name}: differs from the result files; run make figures"
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
