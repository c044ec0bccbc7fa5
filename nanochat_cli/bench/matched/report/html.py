"""A comparison report as one HTML file that needs nothing else: pictures are inside it, nothing is fetched.

Knows sections and a jinja2 template, `comparison.html.jinja`, which escapes every text.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

from nanochat_cli.bench.matched.report.sections import Section

FILE_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("comparison.html.jinja")


def html(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole page. Pictures are read from where the sections say. Raises OSError for one that is not there."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["inline"] = _inline
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, notes=notes, sections=sections) + "\n"


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
