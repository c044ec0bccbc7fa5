"""Which files git ignores: the .gitignore files of a folder and of those below it, read as git reads them."""

from pathlib import Path

from pathspec import GitIgnoreSpec

NAME = ".gitignore"


class Gitignore:
    """The rules from `root` down. Not those of folders above it, nor of the user (core.excludesFile)."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._rules: dict[Path, GitIgnoreSpec | None] = {}

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Whether a path below the root is ignored by itself; what is in an ignored folder is never asked for."""
        for folder in path.parents:
            if folder not in self._rules:
                self._rules[folder] = _rules(folder / NAME)
            rules = self._rules[folder]
            answer = None
            if rules is not None:  # the innermost rule that matches decides
                answer = rules.check_file(path.relative_to(folder).as_posix() + ("/" if is_folder else "")).include
            if answer is not None or folder == self._root:
                return bool(answer)
        return False


def _rules(path: Path) -> GitIgnoreSpec | None:
    try:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # there is none, or it is a folder; git ignores nothing then either
        return None
    return GitIgnoreSpec.from_lines([line for line in lines if _is_valid(line)])


def _is_valid(line: str) -> bool:
    """Git passes over a pattern that it cannot read, such as a lone `!`."""
    try:
        GitIgnoreSpec.from_lines([line])
    except ValueError:
        return False
    return True
