"""`nanochat verify`: whether files are still what was written, by the checksums that were written with them.

A GGUF file carries one of its tensors, a Hugging Face folder and a checkpoint carry one of every file. Nothing is
computed with the model: that a file was right when it was exported is what `nanochat export` has shown.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanochat_cli.errors import DataError
from nanochat_cli.formats.huggingface.checksums import damaged_files
from nanochat_cli.formats.huggingface.files import CHECKSUMS, CONFIG_JSON
from nanochat_cli.formats.run.find import find_run

State = Literal["intact", "damaged", "unknown"]


@dataclass(frozen=True)
class Finding:
    """State of one file, checkpoint or folder. unknown: it carries no checksum."""

    path: Path
    state: State
    detail: str


def check_integrity(target: Path) -> Iterator[Finding]:
    """Findings about a GGUF file, a Hugging Face folder with the GGUF files in it, or a run with its exports.

    Raises DataError for what is none of these, or cannot be read at all.
    """
    if target.is_file():
        yield _of_gguf(target)
        return
    if target.suffix == ".gguf" and not target.exists():
        raise DataError(f"{target}: no such file")
    if (target / CONFIG_JSON).is_file():
        yield from _of_folder(target)
        return
    run = find_run(target)
    yield from _of_checkpoints(run)
    for file in sorted(run.glob("*.gguf")):
        yield _of_gguf(file)
    if (run / "hf" / CONFIG_JSON).is_file():
        yield from _of_folder(run / "hf")


def _of_gguf(path: Path) -> Finding:
    from nanochat_cli.formats.gguf.checksum import KEY, is_intact
    from nanochat_cli.formats.gguf.file import GGUFFile

    file = GGUFFile(path)
    intact = is_intact(file)
    if intact is None:
        return Finding(path, "unknown", f"it has no {KEY}: by another program, or by a version that wrote none")
    count = f"{len(file.tensors)} tensors"
    return Finding(path, "intact", count) if intact else Finding(path, "damaged", f"{count} do not match {KEY}")


def _of_folder(folder: Path) -> Iterator[Finding]:
    damaged = damaged_files(folder)
    if damaged is None:
        yield Finding(folder, "unknown", f"it has no {CHECKSUMS}: by another program, or by a version that wrote none")
    elif damaged:
        yield Finding(folder, "damaged", f"{', '.join(damaged)}: missing, or not as in {CHECKSUMS}")
    else:
        yield Finding(folder, "intact", f"all files of {CHECKSUMS}")
    yield from map(_of_gguf, sorted(folder.glob("*.gguf")))


def _of_checkpoints(run: Path) -> Iterator[Finding]:
    from nanochat_cli.formats.run.checkpoint_folders import name_of, root_of
    from nanochat_cli.formats.run.checkpoints import damage, steps

    for step in steps(run):
        problem = damage(run, step)
        yield Finding(root_of(run) / name_of(step), "damaged" if problem else "intact", problem or "all files")
