"""Stage `environment`: every package that nanochat requires is installed, in a suitable version."""

import platform
import sys
import tempfile
from importlib import metadata

from packaging.requirements import Requirement

from nanochat_cli.diagnose.validate.stage import Figure, Value, Workspace
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.report.environment import usable_cores

OLDEST_PYTHON = (3, 11)
DISTRIBUTION = "nanochat-ternary"


def environment(workspace: Workspace) -> Figure:
    """Compare installed versions with the metadata of the nanochat distribution."""
    if sys.version_info < OLDEST_PYTHON:
        raise ValidationFailure(f"Python {platform.python_version()} is older than {'.'.join(map(str, OLDEST_PYTHON))}")
    required = requirements()
    for requirement in required:
        version = installed(requirement.name)
        if version is None:
            raise ValidationFailure(f"{requirement.name} is not installed: pip install '{requirement}'")
        if not requirement.specifier.contains(version, prereleases=True):
            raise ValidationFailure(f"{requirement.name} {version} does not fit: pip install '{requirement}'")
    with tempfile.TemporaryFile(dir=workspace.folder) as file:
        file.write(b"nanochat")
    return Figure(
        f"Python {platform.python_version()}, torch {installed('torch')}, {usable_cores()} cores; "
        f"{len(required)} required packages in suitable versions",
        [Value("required packages", len(required), "packages"), Value("cores", usable_cores(), "cores")],
    )


def requirements() -> list[Requirement]:
    """What nanochat needs on this system, without extras. Raises ValidationFailure if nanochat is not installed."""
    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        raise ValidationFailure("nanochat runs from its folder without being installed: pip install it") from None
    parsed = map(Requirement, lines)
    return [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
