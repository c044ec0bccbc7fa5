"""Presets: named TOML files under `presets/`, the only place where hyper-parameters live.

Knows where they are (inside an installed wheel, or beside the package in a checkout), how they are named, and the keys
that are about the file itself: `description`, `label`, and `base`, the preset that it changes. Merging is left to
`config.load`.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

from nanochat_cli.config.toml import read_toml
from nanochat_cli.errors import ConfigError

_FLAT_FOLDERS = ("models", "overlays")
_OF_SUITES = ("claims.toml", "profiles.toml")
"""Files that `bench` reads and that are not presets."""


@dataclass(frozen=True)
class Preset:
    """A preset file. `values` are its own keys, without those of its base."""

    name: str
    path: Path
    description: str
    label: str | None
    """The size that the name promises, e.g. "125M": its own or that of its base. None for an overlay."""
    base: "Preset | None"
    values: dict[str, object]

    @property
    def is_overlay(self) -> bool:
        """An overlay changes some keys of a model preset and is not complete by itself."""
        return self.label is None

    def lineage(self) -> list["Preset"]:
        """The presets that it is made of, later ones changing earlier ones; the last is itself."""
        return [*([] if self.base is None else self.base.lineage()), self]


def presets_folder() -> Path:
    """The folder of the presets that came with this installation."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "presets", package.parent / "presets"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no presets beside {package}: the installation is incomplete; reinstall nanochat")


def names() -> list[str]:
    """Names of all presets: models first, then the others, each in alphabetical order."""
    paths = sorted(_files(presets_folder()), key=lambda path: (path.parent.name != "models", path))
    return [_name_of(path) for path in paths]


def available() -> list[Preset]:
    """Every preset, in the order of `names()`."""
    return [load(name) for name in names()]


def load(name: str) -> Preset:
    """Read a preset by name (`nano-125m`, `overlays/cpu`) or by the path of a TOML file, with its bases.

    Raises ConfigError for an unknown name, a file without a description, or a base that `take_base` refuses.
    """
    return _read(_find(name, f"--preset {name}", Path()), ())


def take_base(table: dict[str, object], path: Path, above: tuple[Path, ...] = ()) -> Preset | None:
    """Remove `base` from the table of the file `path`, and load the preset that it names, if any.

    A path is relative to the folder of the file. above: the files whose base leads here. Raises ConfigError unless the
    base is a model preset, and for a circle.
    """
    name = table.pop("base", None)
    if name is None:
        return None
    asked = f"base = {json.dumps(name, default=str)} ({path})"
    if not isinstance(name, str):
        raise ConfigError(f'{asked}: must be the name of a preset, such as "quickstart"')
    found = _find(name, asked, path.parent)
    chain = [place.resolve() for place in (*above, path, found)]
    if chain[-1] in chain[:-1]:
        raise ConfigError(f"{asked}: a circle: {' -> '.join(place.name for place in chain)}")
    base = _read(found, (*above, path))
    if base.is_overlay:
        raise ConfigError(f"{asked}: an overlay; a base is the preset of a model, which has a label")
    return base


def _read(path: Path, above: tuple[Path, ...]) -> Preset:
    table = read_toml(path, what="preset")
    base = take_base(table, path, above)
    description, label = table.pop("description", None), table.pop("label", base and base.label)
    if not isinstance(description, str) or not isinstance(label, str | None):
        raise ConfigError(f'{path}: a preset starts with description = "..." (and label = "..." for a model)')
    return Preset(_name_of(path), path, description, label, base, table)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.toml") if path.name not in _OF_SUITES]


def _name_of(path: Path) -> str:
    try:
        relative = path.relative_to(presets_folder())
    except ValueError:
        return path.stem
    return path.stem if relative.parts[0] in _FLAT_FOLDERS else relative.with_suffix("").as_posix()


def _find(name: str, asked: str, folder: Path) -> Path:
    """The file of a preset. asked: how it was named, for messages; folder: what a path is relative to."""
    if name.endswith(".toml"):
        if (folder / name).is_file():
            return folder / name
        raise ConfigError(f"{asked}: no such file")
    shipped = presets_folder()
    for path in sorted(_files(shipped)):
        if name in (_name_of(path), path.relative_to(shipped).with_suffix("").as_posix()):
            return path
    known = names()
    close = difflib.get_close_matches(name, known, n=1)
    advice = f"did you mean {close[0]}?" if close else f"available: {', '.join(known)}"
    raise ConfigError(f"{asked}: no such preset; {advice}")
