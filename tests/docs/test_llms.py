"""`llms.txt` lists every page of the documentation, and nothing that is not there."""

import re

from benchmarks.update_figures import ROOT


def test_it_lists_every_page_and_every_page_exists():
    listed = re.findall(r"^- \[.+?\]\((.+?)\): ", (ROOT / "llms.txt").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert len(listed) == len(set(listed))
    assert set(listed) == (pages - {"docs/README.md"}) | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
