"""The paths in a configuration: made absolute for a run, found again when it has moved, left out for other readers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.distill import INIT
from nanochat_cli.config.source_parts import parts_without_folders, without_folders

_PATHS = (
    "data.path tokenizer.path collider.reference collider.scores train.init distill.teacher data.base "
    "grpo.source grpo.library grpo.rewards"
).split()


def anchor(config: Config, *, source: bool = True) -> None:
    """Make every path absolute, so that the run can be used from any folder. source: local sources of `[data]` too.

    Names such as stdlib, hf:… or those of published problem sets stay as they are.
    """
    for section, name, path in _paths(config):
        setattr(section, name, path.absolute())
    if source:
        config.data.source = _absolute(config.data.source)
        config.data.sources = tuple(str(part._replace(source=_absolute(part.source))) for part in config.data.parts)
    if config.grpo.task is not None and Path(config.grpo.task).is_file():
        config.grpo.task = str(Path(config.grpo.task).absolute())


def _absolute(source: str) -> str:
    return source if source.startswith("hf:") or not Path(source).exists() else str(Path(source).absolute())


def with_names_only(config: Config) -> Config:
    """A copy for a file that others read: where it has a path, the copy has the name of that file or folder."""
    bare = config.model_copy(deep=True)
    _leave_out_folders(bare)
    bare.data.sources = tuple(map(parts_without_folders, bare.data.sources))
    return bare


def _leave_out_folders(section: BaseModel) -> None:
    for name in type(section).model_fields:
        match getattr(section, name):
            case BaseModel() as inner:
                _leave_out_folders(inner)
            case Path() as path:
                setattr(section, name, Path(path.name))
            case str() as text:
                setattr(section, name, without_folders(text))


def find_paths(config: Config, run: Path) -> None:
    """Look for missing paths in the folders around `run`, and replace those that are found.

    Older runs recorded paths relative to the folder that they were started in. For a data set, the tail of an absolute
    path is tried too, since a folder may have been moved as a whole, with the run in it.
    """
    for section, name, path in _paths(config):
        if not path.exists():
            ends = [path] if not path.is_absolute() else [Path(*path.parts[at:]) for at in range(1, len(path.parts))]
            around = (folder / end for end in ends for folder in run.resolve().parents)
            is_data = section is config.data
            existing = (place for place in around if (place / "manifest.json" if is_data else place).exists())
            setattr(section, name, next(existing, path) if is_data or not path.is_absolute() else path)


def _paths(config: Config) -> Iterator[tuple[Any, str, Path]]:
    for key in _PATHS:
        section_name, _, name = key.partition(".")
        section = getattr(config, section_name)
        path = getattr(section, name)
        if path is not None and path != INIT:
            yield section, name, path
