"""Runs on disk by name: which folder a new run gets, which run is the latest, what a target names.

Knows only the layout `runs/NAME/{config.toml, checkpoints/latest}`; no torch, so a wrong path is an error
within milliseconds.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from nanochat_cli.config.load import CONFIG_FILE
from nanochat_cli.config.schema import Config
from nanochat_cli.config.sections.distill import INIT
from nanochat_cli.config.sections.run import RunConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.folders import held_folder

DEFAULT_FOLDER = Path("runs")


@contextmanager
def new_folder(parent: Path, stem: str, doing: str) -> Iterator[Path]:
    """Create and hold `parent/stem-N`, with the first N after all that exist; no other process gets the same."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)")
    while True:
        taken = [int(match[1]) for path in _children(parent) if (match := pattern.fullmatch(path.name))]
        folder = parent / f"{stem}-{max(taken, default=0) + 1}"
        require_writable(folder)
        made = not parent.exists()
        try:
            folder.mkdir(parents=True)  # the claim: of several processes one succeeds
        except FileExistsError:
            continue
        break
    try:
        with held_folder(folder, doing):
            yield folder
    finally:
        for path in (folder, parent) if made else (folder,):
            with suppress(OSError):  # it is not empty
                path.rmdir()


@contextmanager
def new_run(run: RunConfig, stem: str, doing: str) -> Iterator[Path]:
    """Claim and hold the folder of a new run; a run without a name gets the next one after `stem`.

    Raises ConfigError for a name that is not a folder name or is taken, DataError if it cannot be written.
    """
    if run.name is None:
        claimed = new_folder(run.dir, stem, doing)
    else:
        require_free(run)
        require_writable(run.dir / run.name)
        claimed = held_folder(run.dir / run.name, doing)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(claimed)
        except OSError as error:
            where = run.dir / (run.name or stem)
            raise DataError(f"cannot write {where}: {error.strerror}; free space or choose another run.dir") from error
        require_free(run)  # another process may have been faster
        run.name = folder.name
        yield folder


def require_free(run: RunConfig) -> None:
    """Raise ConfigError if `run.name` is set, and is not a folder name or is already a run's."""
    name = run.name
    if name is None:
        return
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ConfigError(f'run.name = "{name}": must be the name of a folder, without "/"; run.dir says where it is')
    if (run.dir / name / CONFIG_FILE).exists():
        raise ConfigError(
            f"{run.dir / name}: a run of that name exists; continue it with --resume or choose another --name"
        )


def latest_run(folder: Path = DEFAULT_FOLDER) -> Path:
    """The run in `folder` that saved a checkpoint last. Raises DataError if there is none."""
    pointers = [pointer for path in _children(folder) if (pointer := path / "checkpoints" / "latest").is_file()]
    if not pointers:
        raise DataError(f"{folder}: no run with a checkpoint here; train one (nanochat train) or name a run")
    return max(pointers, key=lambda pointer: pointer.stat().st_mtime_ns).parent.parent


def find_run(target: Path | None) -> Path:
    """The folder of a run: the latest one, a path, or a name inside `runs/`. Raises DataError."""
    if target is None:
        return latest_run()
    for folder in (target, DEFAULT_FOLDER / target):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not target.exists():
        raise DataError(f"{target}: no such run")
    if target.suffix == ".gguf" and target.is_file():
        raise DataError(f"{target}: a GGUF file, but this needs the run it was exported from: name its folder")
    inside = next((folder for folder in target.resolve().parents if (folder / CONFIG_FILE).is_file()), None)
    if inside is not None:
        raise DataError(f"{target}: a part of the run {inside}: name the run's folder (--checkpoint chooses a step)")
    raise DataError(f"{target}: not a run of nanochat train (it has no {CONFIG_FILE})")


def find_run_or_gguf(target: Path | None) -> Path:
    """Like `find_run`, but takes a `.gguf` file as it is."""
    if target is not None and target.suffix == ".gguf":
        if not target.is_file():
            raise DataError(f"{target}: no such file")
        return target
    return find_run(target)


def is_in_run(source: Path) -> bool:
    """Whether a path is that of a run, or looks like a checkpoint of one."""
    return (source / CONFIG_FILE).is_file() or re.fullmatch(r"step-\d+", source.name) is not None


def run_and_checkpoint(source: Path) -> tuple[Path, Literal["latest"] | int]:
    """The run that a key names, and its checkpoint: RUN, or RUN/checkpoints/step-000500. Raises DataError."""
    folder = source.absolute()
    run, step = folder.parent.parent, re.fullmatch(r"step-(\d+)", folder.name)
    if step is not None and folder.parent == run / "checkpoints":
        if not folder.is_dir():
            raise DataError(f"{source}: {run} has no such checkpoint")
        return run, int(step[1])
    if not (source / CONFIG_FILE).is_file():
        advice = "make a run of it with: nanochat import" if source.exists() else "no such folder"
        raise DataError(f"{source}: not a run, nor a checkpoint of one (RUN/checkpoints/step-000500): {advice}")
    return source, "latest"


def source_runs(config: Config, *, begins: bool) -> dict[str, Path]:
    """The runs that training reads weights of, by the key that names them. Raises DataError for what is no run.

    begins: it starts at step 0; later the weights are those of its own checkpoint. Initial weights may come from what
    is no run too (`formats.initial`), except those of a teacher.
    """
    named, init = {"distill.teacher": config.distill.teacher}, config.train.init
    if config.distill.teacher == INIT or (begins and init is not None and is_in_run(init)):
        named["train.init"] = init
    found: dict[str, Path] = {}
    for key, path in named.items():
        if path is not None and path != INIT:
            try:
                found[key] = run_and_checkpoint(path)[0]
            except DataError as error:
                raise DataError(f"{key} = {error}") from None
    return found


def which_checkpoint(target: Path, text: str | None) -> Literal["latest", "best"] | int:
    """The checkpoint that `--checkpoint TEXT` names. Raises ConfigError and DataError, with the saved steps."""
    if text is None:
        return "latest"
    if target.suffix == ".gguf":
        raise ConfigError(f"--checkpoint {text}: {target} holds one model; only a run has checkpoints")
    folder = target / "checkpoints"
    steps = sorted(int(match[1]) for path in _children(folder) if (match := re.fullmatch(r"step-(\d+)", path.name)))
    saved = f"saved steps: {', '.join(map(str, steps)) or 'none'}"
    if text in ("latest", "best"):
        if not (folder / text).is_file():
            raise DataError(f"--checkpoint {text}: {target} has none ({saved}); checkpoint.keep_best keeps the best")
        return text
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII):
        raise ConfigError(f"--checkpoint {text}: must be best, latest or a step ({saved})")
    if int(text) not in steps:
        raise DataError(f"--checkpoint {text}: {target} has no checkpoint of that step ({saved})")
    return int(text)


def require_writable(path: Path) -> None:
    """Raise DataError if `path` cannot be created or written, before hours are spent on it."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if existing != path and not existing.is_dir():
        raise DataError(f"{path}: cannot be written: {existing} is not a folder")
    if not os.access(existing, os.W_OK):
        raise DataError(f"{path}: cannot be written: {existing} is read-only")


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
