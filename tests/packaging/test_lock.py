"""`requirements.lock` is what `pyproject.toml` asks for: each requirement, in a version that fits, with hashes."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ENTRY = re.compile(r"(?m)^(?P<requirement>[^\s#].*?)(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)$")
USES = ("test", "dev")


def required(project: dict, extra: str | None = None) -> Iterator[Requirement]:
    """Direct requirements of the project or of an extra, and of the extras that this one names."""
    for text in project["dependencies"] if extra is None else project["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for other in requirement.extras:
                yield from required(project, other)
        else:
            yield requirement


@pytest.fixture(scope="module")
def locked() -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for entry in ENTRY.finditer((ROOT / "requirements.lock").read_text()):
        requirement = Requirement(entry["requirement"])
        found.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return found


def test_every_requirement_is_locked_in_a_version_that_fits(locked):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*required(project), *(one for extra in USES for one in required(project, extra))]
    assert len(wanted) > 25
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in locked, "run make lock"
        versions = [str(one.specifier).removeprefix("==") for one in locked[name]]
        assert all(requirement.specifier.contains(version, prereleases=True) for version in versions), requirement


def test_every_line_belongs_to_a_pinned_package_with_hashes_and_no_address():
    text = (ROOT / "requirements.lock").read_text()
    assert ENTRY.sub("", text).strip() == ""
    assert all(re.match(r"[\w.-]+==[\w.+]+( ;|$)", entry["requirement"]) for entry in ENTRY.finditer(text))
    assert "://" not in text
