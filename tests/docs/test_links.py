"""Every relative link in README.md and docs/ leads to a file of this repository, and to its heading if it has one."""

import re
from pathlib import Path

import pytest

from benchmarks.update_figures import ROOT
from tests.docs.markdown import NAMES, anchors, having, links, read


def relative_links(text: str) -> list[str]:
    return [target for target in links(text) if not re.match(r"[a-z]+:", target)]


@pytest.mark.parametrize("name", having(relative_links))
def test_every_relative_link_leads_somewhere(name):
    page = ROOT / name
    for target in relative_links(read(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target}: outside the repository"
        if anchor:
            assert anchor in anchors(read(file)), f"{target}: no such heading"


def linked_from(name: str) -> set[Path]:
    page = ROOT / name
    return {(page.parent / target).resolve() for target in relative_links(read(page))}


def test_every_page_can_be_reached_from_the_readme():
    index = "docs/README.md"
    assert ROOT / index in linked_from("README.md")
    assert {ROOT / name for name in NAMES} - {ROOT / index} <= linked_from("README.md") | linked_from(index)


_PATH = re.compile(r"`((?:nanochat_cli|kernels|tests|benchmarks(?!/results)|presets|docs|\.ci)/[\w./-]+)`")


@pytest.mark.parametrize("name", having(lambda text: _PATH.search(text)))
def test_every_file_that_a_page_names_exists(name):
    assert [path for path in _PATH.findall(read(ROOT / name)) if not (ROOT / path).exists()] == []


def test_links_are_found_where_they_are(tmp_path):
    text = '[a](x.md) ![b](y.png "title") `[c](z.md)` <!-- [d](w.md) -->\n```\n[e](v.md)\n```\n'
    text += '[1][f]\n[f]: u.json "title"\n'
    assert list(links(text)) == ["x.md", "y.png", "u.json"]
