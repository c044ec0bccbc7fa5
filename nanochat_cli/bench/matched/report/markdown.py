"""A comparison report as Markdown: `REPORT.md`, with its pictures beside it.

Knows sections and the characters that Markdown would take for its own.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from nanochat_cli.bench.matched.report.sections import Section
from nanochat_cli.bench.matched.report.tables import Table

FILE_NAME = "REPORT.md"


def markdown(title: str, notes: Sequence[str], sections: Sequence[Section], folder: Path) -> str:
    """The whole page. folder: where it will lie; pictures are linked from there."""
    parts = [f"# {escape(title)}", *(f"> {escape(note)}" for note in notes)]
    for section in sections:
        parts.append(f"## {escape(section.title)}")
        parts += [escape(text) for text in section.text]
        if section.table is not None:
            parts.append(_table(section.table))
        parts += [f"![{escape(name)}]({path.relative_to(folder).as_posix()})" for name, path in section.pictures]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """One line of text that shows as it stands, in a paragraph and in a cell of a table."""
    text = " ".join(text.split()).replace("&", "&amp;")
    text = re.sub(r"([\\`*<>\[\]|#~$])", r"\\\1", text)
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(f"| {' | '.join(line if line == '---' else escape(line) for line in cells)} |" for cells in lines)
