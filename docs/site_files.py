"""The files of the documentation site, for MkDocs: every page of the repository, and every file that one links to.

They are copied into build/docs under the paths that they have in the repository, so that a link that works on GitHub
works on the site, and MkDocs finds the ones that do not. Run by `make docs`.
"""

import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig

from benchmarks.update_figures import ROOT, pages, without_code

_LINK = re.compile(r"\]\(([^()\s#]+)|^\[[^\]\n]+\]: ([^\s#]+)", re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """Make the site of build/docs, which is filled here."""
    source = ROOT / "build" / "docs"
    shutil.rmtree(source, ignore_errors=True)
    waiting, files = set(pages()), set()
    while waiting:
        file = waiting.pop()
        files.add(file)
        waiting |= linked(file) - files
    for file in files:
        place = source / file.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    config.docs_dir = str(source)


def linked(file: Path) -> set[Path]:
    """Files of the repository that a page links to; other files link to nothing."""
    if file.suffix != ".md":
        return set()
    text = without_code(file.read_text(encoding="utf-8"))
    targets = {file.parent / (match[1] or match[2]) for match in _LINK.finditer(text)}
    return {path for target in targets if (path := target.resolve()).is_file() and path.is_relative_to(ROOT)}
