"""Which files of a folder are a corpus: those that match a glob, except what programs left there.

Whole folders are left out: hidden ones, virtual environments, caches, installed packages, and everything that nanochat
itself wrote: data sets, runs (also those of `grpo`), suites. A corpus must not eat its own output.
"""

import os
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from nanochat_cli.data.gitignore import Gitignore
from nanochat_cli.errors import DataError
from nanochat_cli.nesting import parse_json

TOOL_FOLDERS = ("__pycache__", "node_modules")
LICENCE_FILE = re.compile(r"(?:(?:un)?licen[cs]e|copying)(?:[-_][\w.+-]+)?(?:\.(?:txt|md|rst|html))?", re.IGNORECASE)
# A file of this name makes its folder a cache (bford.info/cachedir), or a virtual environment (PEP 405).
TOOL_MARKS = ("CACHEDIR.TAG", "pyvenv.cfg")
# Keys of a data set's manifest that, say, a browser extension's manifest lacks.
MANIFEST_KEYS = {"fingerprint", "content", "settings", "tokenizer"}


class Found(NamedTuple):
    """files: those of the corpus, sorted by relative path; ignored: files and folders that git ignores."""

    files: list[Path]
    ignored: int
    licences: list[Path]
    """Files that hold a licence, whatever the glob."""


def walk(
    root: Path, glob: str, leave_out: Collection[str] = (), output: Path | None = None, *, gitignore: bool = False
) -> Found:
    """Files below `root` that match `glob`.

    Without a slash `glob` is matched against the file name at any depth. Links to folders, which may form loops, are
    not followed. leave_out: names of folders; output: the folder to be written. Raises DataError for an unreadable one.
    """
    rules = Gitignore(root) if gitignore else None
    found: list[tuple[str, ...]] = []
    licences: list[tuple[str, ...]] = []
    left_out = {*leave_out, *TOOL_FOLDERS}
    outputs = {path.resolve() for path in (output,) if path is not None}
    ignored = 0

    def unreadable(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot read the folder: {error.strerror}") from error

    for folder, folders, names in os.walk(root, onerror=unreadable):
        here = Path(folder)
        if here != root and (made_by(here, names, folders) or here.resolve() in outputs):
            folders.clear()
            continue
        inside = [name for name in folders if not name.startswith(".") and name not in left_out]
        parents = here.relative_to(root).parts
        files = [name for name in names if not name.startswith(".")]
        wanted = [name for name in files if matches((*parents, name), glob)]
        if rules is not None:
            folders[:] = [name for name in inside if not rules.ignores(here / name, is_folder=True)]
            kept = [name for name in wanted if not rules.ignores(here / name, is_folder=False)]
            ignored += len(inside) - len(folders) + len(wanted) - len(kept)
            wanted = kept
        else:
            folders[:] = inside
        found += [(*parents, name) for name in wanted]
        licences += [(*parents, name) for name in files if LICENCE_FILE.fullmatch(name)]
    paths = [root.joinpath(*parts) for parts in sorted(found)]
    # Not a socket, a pipe or a dangling link, and not what `tokenize --json` wrote.
    usable = [path for path in paths if path.is_file() and not (path.suffix == ".json" and _is_result(path))]
    return Found(usable, ignored, [root.joinpath(*parts) for parts in sorted(licences)])


def made_by(folder: Path, names: Collection[str], folders: Collection[str]) -> str | None:
    """The kind of program output in a folder with these files and folders: "a data set", …; None for a person's."""
    if any(mark in names for mark in TOOL_MARKS):
        return "a cache or a virtual environment"
    if "config.toml" in names and ("environment.json" in names or "checkpoints" in folders):
        return "a run"
    if "suite.json" in names and "configs" in folders:
        return "a suite"
    if "manifest.json" in names and _is_manifest(folder / "manifest.json"):
        return "a data set"
    return None


def _is_result(path: Path) -> bool:
    """Whether a .json is the result of `tokenize --json`: the manifest with the folder, or the line of its error."""
    try:
        with path.open("rb") as file:
            if not file.read(32).startswith((b'{\n  "dataset"', b'{\n  "error"')):
                return False
        return _is_manifest(path) or parse_json(path.read_bytes()).keys() == {"error", "exit_code"}
    except (OSError, ValueError, AttributeError):
        return False


def _is_manifest(path: Path) -> bool:
    try:
        manifest = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.keys() >= MANIFEST_KEYS


def matches(parts: tuple[str, ...], glob: str) -> bool:
    """Whether the components of a path match a glob: without a slash, the file name at any depth."""
    return _matches(parts, ["**", glob] if "/" not in glob else glob.split("/"))


def _matches(parts: tuple[str, ...], patterns: list[str]) -> bool:
    """Whether path components match glob components; `**` stands for any number of folders."""
    if not patterns:
        return not parts
    if patterns[0] == "**":
        if patterns[1:] == []:
            return bool(parts)
        return any(_matches(parts[skip:], patterns[1:]) for skip in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])
