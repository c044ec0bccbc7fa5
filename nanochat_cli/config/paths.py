"""The paths of a configuration: absolute in what a run keeps, found again in what older runs kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanochat_cli.config.schema import Config

_PATHS = ("data.path", "tokenizer.path", "collider.reference", "collider.scores")
_GRPO_PATHS = ("grpo.source", "grpo.library", "grpo.rewards")


def anchor(config: Config, *, source: bool = True) -> None:
    """Make every path absolute, so that the run can be used from any folder. source: a local `data.source` too.

    What is no path stays: names such as stdlib and hf:…, or those of published problems.
    """
    for section, name, path in _paths(config):
        setattr(section, name, path.absolute())
    if source and not config.data.source.startswith("hf:") and Path(config.data.source).exists():
        config.data.source = str(Path(config.data.source).absolute())
    if config.grpo.task is not None and Path(config.grpo.task).is_file():
        config.grpo.task = str(Path(config.grpo.task).absolute())


def find_paths(config: Config, run: Path) -> None:
    """Have paths that are not there point to where they are around `run`, if they are.

    A relative path is that of the folder where an older run was started. Of a data set the end of an absolute path is
    looked for too: a folder may have been moved as a whole, with the run in it.
    """
    for section, name, path in _paths(config):
        if not path.exists():
            ends = [path] if not path.is_absolute() else [Path(*path.parts[at:]) for at in range(1, len(path.parts))]
            around = (folder / end for end in ends for folder in run.resolve().parents)
            is_data = section is config.data
            found = (place for place in around if (place / "manifest.json" if is_data else place).exists())
            setattr(section, name, next(found, path) if is_data or not path.is_absolute() else path)


def _paths(config: Config) -> Iterator[tuple[Any, str, Path]]:
    for key in _PATHS + _GRPO_PATHS:
        section_name, _, name = key.partition(".")
        section = getattr(config, section_name)
        path = getattr(section, name)
        if path is not None:
            yield section, name, path
