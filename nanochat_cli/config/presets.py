"""Presets: named TOML files under `presets/`, the only place where hyper-parameters live.

Knows where they are (inside an installed wheel, or beside the package in a checkout), how they are
named, and the two keys that describe them. Merging is left to `config.load`.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from nanochat_cli.config.files import read_toml
from nanochat_cli.errors import ConfigError

_FLAT_FOLDERS = ("models", "overlays")
_OF_SUITES = ("claims.toml", "profiles.toml")
"""What `bench` reads beside presets."""


@dataclass(frozen=True)
class Preset:
    """A preset file. `values` is its table without the keys that describe it."""

    name: str
    path: Path
    description: str
    label: str | None
    """The size that the name promises, e.g. "125M"; None for an overlay."""
    values: dict[str, object]

    @property
    def is_overlay(self) -> bool:
        """An overlay changes some keys of a model preset and is not complete by itself."""
        return self.label is None


def presets_folder() -> Path:
    """The folder of the presets that came with this installation."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "presets", package.parent / "presets"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no presets beside {package}: the installation is incomplete; reinstall nanochat")


def names() -> list[str]:
    """Names of all presets: models first, then the rest, alphabetical within each."""
    paths = sorted(_files(presets_folder()), key=lambda path: (path.parent.name != "models", path))
    return [_name_of(path) for path in paths]


def available() -> list[Preset]:
    """Every preset, in the order of `names()`."""
    return [load(name) for name in names()]


def load(name: str) -> Preset:
    """Read a preset by name (`nano-125m`, `overlays/cpu`) or by the path of a TOML file.

    Raises ConfigError for an unknown name or a file without a description.
    """
    path = _find(name)
    table = read_toml(path, what="preset")
    description, label = table.pop("description", None), table.pop("label", None)
    if not isinstance(description, str) or not isinstance(label, str | None):
        raise ConfigError(f'{path}: a preset starts with description = "..." (and label = "..." for a model)')
    return Preset(_name_of(path), path, description, label, table)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.toml") if path.name not in _OF_SUITES]


def _name_of(path: Path) -> str:
    try:
        relative = path.relative_to(presets_folder())
    except ValueError:
        return path.stem
    return path.stem if relative.parts[0] in _FLAT_FOLDERS else relative.with_suffix("").as_posix()


def _find(name: str) -> Path:
    if name.endswith(".toml"):
        if Path(name).is_file():
            return Path(name)
        raise ConfigError(f"--preset {name}: no such file")
    folder = presets_folder()
    for path in sorted(_files(folder)):
        if name in (_name_of(path), path.relative_to(folder).with_suffix("").as_posix()):
            return path
    known = names()
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}?" if close else f"available: {', '.join(known)}"
    raise ConfigError(f"--preset {name}: no such preset; {advice}")
