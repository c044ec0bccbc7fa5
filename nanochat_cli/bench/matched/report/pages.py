"""A comparison report as Markdown, with its pictures beside it, and as one HTML file with everything inside.

Knows sections, the characters that Markdown interprets, and the template `comparison.html.jinja`, which escapes every
text.
"""

import base64
import re
from collections.abc import Sequence
from pathlib import Path

from nanochat_cli.bench.matched.report.sections import Section
from nanochat_cli.bench.matched.report.tables import Table

_TEMPLATE = Path(__file__).with_name("comparison.html.jinja")


def markdown(title: str, notes: Sequence[str], sections: Sequence[Section], folder: Path) -> str:
    """The whole page. folder: where it will be; links to pictures are relative to it."""
    parts = [f"# {escape(title)}", *(f"> {escape(note)}" for note in notes)]
    for section in sections:
        parts += [f"## {escape(section.title)}", *map(escape, section.text)]
        if section.table is not None:
            parts.append(_table(section.table))
        parts += [f"![{escape(name)}]({path.relative_to(folder).as_posix()})" for name, path in section.pictures]
    return "\n\n".join(parts)


def html(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. Raises OSError for a picture that cannot be read."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, notes=notes, sections=sections)


def escape(text: str) -> str:
    """The text on one line, so that Markdown shows it literally, in a paragraph or in a table cell."""
    text = " ".join(text.split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*<>\[\]|#~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _table(table: Table) -> str:
    lines = [map(escape, table.columns), ["---"] * len(table.columns), *(map(escape, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
