"""Where the checkpoints of a run are: the folder of each step, and the pointers `latest` and `best`."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from nanochat_cli.atomic_write import sync
from nanochat_cli.errors import DataError

Pointer = Literal["latest", "best"]

TEMPORARY = ".tmp-"
REPLACED = ".replaced-"


def root_of(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def step_of(name: str) -> int | None:
    number = name.removeprefix("step-")
    return int(number) if number != name and number.isdecimal() else None


def steps_in(root: Path) -> Iterator[int]:
    names = {path.name.removeprefix(REPLACED) for path in root.iterdir()} if root.is_dir() else set()
    return (step for name in names if (step := step_of(name)) is not None)


def folder_of(root: Path, step: int) -> Path | None:
    """Folder of a step; the replaced one stands in when a crash hit between the two renames of `save`."""
    candidates = (root / name_of(step), root / (REPLACED + name_of(step)))
    return next((folder for folder in candidates if folder.is_dir()), None)


def finish_replacements(root: Path) -> None:
    """After a crash inside the replacement of a step: puts the old folder back, or removes it for the new one."""
    for replaced in root.glob(REPLACED + "*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def write_synced(path: Path, text: str) -> None:
    """Write a file that is on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def point(root: Path, pointer: Pointer, step: int) -> None:
    temporary = root / (TEMPORARY + pointer)
    write_synced(temporary, name_of(step) + "\n")
    temporary.replace(root / pointer)
    sync(root)


def pointed_step(root: Path, pointer: Pointer) -> int | None:
    try:
        name = (root / pointer).read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{root / pointer} cannot be read: {error.strerror}; check its permissions") from error
    step = step_of(name)
    if step is None:
        raise DataError(f"{root / pointer} holds {name[:40]!r}; write the name of a checkpoint folder into it")
    return step
