"""The documentation as a site: it builds without a warning, so no link, anchor or page of its navigation is broken."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.update_figures import ROOT
from tests.docs.markdown import NAMES, PAGES, read


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    return folder


def html(site: Path, name: str) -> str:
    path = Path(name)
    folder = path.parent if path.stem == "README" else path.with_suffix("")
    return (site / folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_every_page_is_there_with_its_tables_and_pictures(site, name):
    text, shown = read(ROOT / name), html(site, name)
    without_code = re.sub(r"<(pre|code)\b.*?</\1>|<!--.*?-->", "", shown, flags=re.DOTALL)
    assert not re.search(r"\|\s*-{3}|\[[^\]<]+\]\[[^\]<]+\]", without_code), "a table or a reference was not understood"
    assert shown.count("<img") >= len(re.findall(r"^!\[", text, re.MULTILINE))


def test_nothing_is_loaded_from_elsewhere(site):
    assert re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//[^"]+"', html(site, "README.md")) == []


def test_every_page_is_in_the_navigation():
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = re.findall(r": ([\w/.-]+\.md)$", configuration, re.MULTILINE)
    assert sorted(named) == sorted(page.relative_to(ROOT).as_posix() for page in PAGES)


def test_a_broken_link_is_found_out(tmp_path):
    # The strict build is worth something only if it fails; a copy of the configuration with a page too many does.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    broken = text.replace("docs/sandbox.md", "docs/sandpit.md").replace("docs_dir: docs", f"docs_dir: {ROOT / 'docs'}")
    (tmp_path / "mkdocs.yml").write_text(broken.replace("docs/site_files.py", str(ROOT / "docs" / "site_files.py")))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(tmp_path / "mkdocs.yml")]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode != 0
    assert "sandpit" in child.stderr
