"""Checkpoints: `RUN/checkpoints/step-000500/{model,optimizer,…}.safetensors + state.json`, and two pointer files.

Of N processes that save together each writes what it has, as `model-00002-of-0000N.safetensors`; state.json lists all.

Knows how a nested dictionary of tensors and plain values becomes files that survive `kill -9`, a full disk and bit
rot, and how it comes back exactly. What is in the dictionaries is up to the caller. No pickle anywhere.

A checkpoint is written to a hidden folder beside its place, every file and the folder are fsynced, and a rename makes
it visible; only then does the pointer `latest` (and `best`) change, by an atomic replace. A folder that replaces one
of the same step first moves the old one to `.replaced-step-N`, which stands in for it until the new one is there.
So at every instant the pointers name a complete checkpoint. A damaged one is an error that names the newest intact
one; nothing is ever loaded instead of what was asked for.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from nanochat_cli.atomic_write import sync
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.run.checkpoint_folders import (
    REPLACED,
    TEMPORARY,
    Pointer,
    finish_replacements,
    folder_of,
    name_of,
    point,
    pointed_step,
    root_of,
    steps_in,
    write_synced,
)
from nanochat_cli.formats.run.state_tree import decode, encode
from nanochat_cli.nesting import parse_json

Which = Pointer | int

FORMAT = 1
OF_SEVERAL = 2
"""The format of a checkpoint that several processes wrote: a part is in one file or more."""
STATE_FILE = "state.json"
_FILE = re.compile(r"(.+?)(-\d{5}-of-\d{5})?\.safetensors")
_REMOVED = ".removed-"


@dataclass(frozen=True)
class Checkpoint:
    """What `load` returns; `tensors` and `state` equal what was given to `save`, with the types of keys and values."""

    path: Path
    step: int
    tensors: dict[str, Any]
    state: dict[str, Any]
    model_config: dict[str, Any]
    sha256: dict[str, str]
    """Of the files of each part, of which a part that one process wrote has one."""


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Any],
    state: Mapping[str, Any],
    *,
    model_config: Mapping[str, Any],
    best: bool = False,
) -> Path:
    """Writes a checkpoint and points `latest` (and with `best`, `best`) to it; returns its folder.

    tensors: part name → nested dictionaries and lists of tensors (any dtype, device and shape) and plain values; each
    part with a tensor in it is one safetensors file, whose keys are the nested keys joined by "/".
    state: nested plain values (None, bool, int, float, str, lists, tuples, dictionaries).
    model_config: plain dictionary of the model section, to recognise a checkpoint of another model.

    Raises DataError when the files cannot be written (full disk, read-only folder): whatever was saved before is
    intact. Raises TypeError for a value that is neither a tensor nor plain: that is a fault of the caller.
    """
    prepare(run_dir, step)
    return publish(run_dir, step, [write(run_dir, step, tensors)], state, model_config=model_config, best=best)


def prepare(run_dir: Path, step: int) -> None:
    """Make the hidden folder into which the processes that save a checkpoint together `write`. Raises DataError."""
    with _saving(run_dir, step) as temporary:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        finish_replacements(temporary.parent)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()


def write(run_dir: Path, step: int, tensors: Mapping[str, Any], process: int = 0, processes: int = 1) -> dict[str, Any]:
    """Write what one process has of a checkpoint, none of which another has; returns plain values for `publish`.

    tensors: as in `save`. Raises DataError.
    """
    suffix = f"-{process + 1:05d}-of-{processes:05d}" if processes > 1 else ""
    files: dict[str, dict[str, torch.Tensor]] = {}
    structure: dict[str, Any] = {}
    for part, tree in tensors.items():
        flat: dict[str, torch.Tensor] = {}
        structure[part] = encode(tree, (), flat)
        if flat:
            files[f"{part}{suffix}.safetensors"] = flat
    with _saving(run_dir, step, removing=processes == 1) as temporary:
        written = {name: _write_tensors(temporary / name, flat) for name, flat in files.items()}
    return {"structure": structure, "files": written}


def publish(
    run_dir: Path,
    step: int,
    written: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any],
    *,
    model_config: Mapping[str, Any],
    best: bool = False,
) -> Path:
    """Make a checkpoint of what all processes have written, and point to it; see `save`."""
    document: dict[str, Any] = {
        "format": FORMAT if len(written) == 1 else OF_SEVERAL,
        "step": step,
        "model_fingerprint": fingerprint(model_config),
        "model_config": encode(model_config, ("model_config",), None),
        "state": encode(state, ("state",), None),
        "structure": reduce(_union, (one["structure"] for one in written)),
        "files": reduce(_union, (one["files"] for one in written)),
    }
    with _saving(run_dir, step) as temporary:
        root, final = temporary.parent, temporary.parent / name_of(step)
        write_synced(temporary / STATE_FILE, _seal(document))
        sync(temporary)
        replaced = root / (REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(root)
        point(root, "latest", step)
        if best:
            point(root, "best", step)
        if replaced.exists():
            shutil.rmtree(replaced)
    return final


@contextmanager
def _saving(run_dir: Path, step: int, *, removing: bool = True) -> Iterator[Path]:
    """The hidden folder of a checkpoint that is being written; removing: when that fails. Raises DataError."""
    root = root_of(run_dir)
    temporary = root / (TEMPORARY + name_of(step))
    try:
        yield temporary
    except (OSError, SafetensorError) as error:
        if removing:
            shutil.rmtree(temporary, ignore_errors=True)
        kept = pointed_step(root, "latest")
        intact = "there is no earlier checkpoint" if kept is None else f"the checkpoint of step {kept} is intact"
        raise DataError(
            f"cannot save the checkpoint of step {step} in {root}: {reason(error)}; {intact}; "
            "free space, or choose another run.dir"
        ) from error


def _union(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    """Of trees of dictionaries that have no leaf in common."""
    return {**left, **{key: _union(left[key], value) if key in left else value for key, value in right.items()}}


def load(run_dir: Path, which: Which = "latest", *, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads the checkpoint that a pointer names, or that of a step; every file is checked against its SHA-256.

    Raises DataError when there is none, or when it is damaged; the message then names the newest intact one.
    """
    root = root_of(run_dir)
    while True:
        step = which if isinstance(which, int) else _named_step(root, which)
        folder = folder_of(root, step)
        if folder is None:
            damage = None
        else:
            seen = _identity(root, which)
            try:
                return _read(folder, _verified_document(folder), device)
            except _DamageError as error:
                damage = error
            if _identity(root, which) != seen:
                continue  # a training that goes on has replaced or removed it while it was read
        if isinstance(which, int) or _named_step(root, which) == step:
            raise _unreadable(root, step, folder, damage) from damage


def _named_step(root: Path, pointer: Pointer) -> int:
    step = pointed_step(root, pointer)
    if step is None:
        raise DataError(f"{root}: no `{pointer}` checkpoint ({_known(root)}); train first, or name a saved step")
    return step


def _identity(root: Path, which: Which) -> tuple[int | None, int | None]:
    """Changes when the checkpoint that `which` means becomes another one."""
    step = which if isinstance(which, int) else pointed_step(root, which)
    try:
        return step, None if step is None else (root / name_of(step)).stat().st_ino
    except FileNotFoundError:
        return step, None


def _unreadable(root: Path, step: int, folder: Path | None, damage: "_DamageError | None") -> DataError:
    """What is wrong with a checkpoint that was asked for, and which one to take instead."""
    if folder is None:
        return DataError(f"{root}: there is no checkpoint of step {step} ({_known(root)})")
    intact = _newest_intact(root, excluding=step)
    advice = (
        f"the newest intact one is step {intact}: to go on from it, write {name_of(intact)} into {root / 'latest'}"
        if intact is not None
        else "no other is intact"
    )
    return DataError(f"{folder} is damaged: {damage}; {advice}")


def _known(root: Path) -> str:
    return f"saved steps: {', '.join(str(step) for step in sorted(steps_in(root))) or 'none'}"


def steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return sorted(steps_in(root_of(run_dir)))


def damage(run_dir: Path, step: int) -> str | None:
    """What is wrong with the files of a checkpoint that is there; None if all match their SHA-256."""
    folder = folder_of(root_of(run_dir), step)
    return "removed meanwhile" if folder is None else _damage(folder)


def latest_step(run_dir: Path) -> int | None:
    """Step that `latest` names, or None when nothing has been saved."""
    return pointed_step(root_of(run_dir), "latest")


def is_empty(run_dir: Path) -> bool:
    """Whether no save has ever finished. One folder without a pointer is a first save that a crash cut short."""
    return latest_step(run_dir) is None and len(steps(run_dir)) <= 1


def prune(run_dir: Path, keep_last: int, best_step: int | None = None) -> list[int]:
    """Removes all but the last `keep_last`, `best_step` and what the pointers name; returns the steps removed.

    Also removes what interrupted saves left behind. Steps above `latest` (of a run that was continued from an earlier
    checkpoint) are neither counted nor removed: the run writes over them when it gets there.
    """
    root = root_of(run_dir)
    pointed = {pointed_step(root, "latest"), pointed_step(root, "best")}
    newest = pointed_step(root, "latest")
    try:
        finish_replacements(root)
        for pattern in (TEMPORARY + "*", _REMOVED + "*"):
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        past = [step for step in sorted(steps_in(root)) if newest is None or step <= newest]
        keep = {*past[-keep_last:], *pointed, best_step}
        removed = [step for step in past if step not in keep]
        for step in removed:
            # Renamed first: a folder that is half removed never looks like a checkpoint.
            doomed = root / (_REMOVED + name_of(step))
            (root / name_of(step)).rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise DataError(f"cannot remove old checkpoints in {root}: {error.strerror}; check its permissions") from error
    return removed


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a plain configuration."""
    return hashlib.sha256(_canonical(encode(config, (), None))).hexdigest()


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators: `cpu`, and `cuda:N` for every device when CUDA is in use; uint8 [n] each."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_rng_state(states: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `rng_state` returned; states of devices that this machine lacks are left out."""
    torch.set_rng_state(states["cpu"].cpu())
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(devices):
        if (state := states.get(f"cuda:{index}")) is not None:
            torch.cuda.set_rng_state(state.cpu(), index)


class _DamageError(Exception):
    """What is wrong with the files of a checkpoint; becomes a DataError in `load`."""


# --- files --------------------------------------------------------------------------------------------------------


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _seal(document: dict[str, Any]) -> str:
    """Text of state.json: the document and the SHA-256 of its canonical form, so that it vouches for itself too."""
    sealed = {**document, "sha256": hashlib.sha256(_canonical(document)).hexdigest()}
    return json.dumps(sealed, indent=1, allow_nan=False) + "\n"


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Writes one safetensors file and returns its size in bytes and SHA-256."""
    stored: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that share memory; each name gets its own copy.
        stored[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    safetensors_torch.save_file(stored, path)
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified_document(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint after its own seal, and the size and hash of every tensor file, have been checked."""
    try:
        document = parse_json((folder / STATE_FILE).read_text(encoding="utf-8"))
        seal = document.pop("sha256")
        if seal != hashlib.sha256(_canonical(document)).hexdigest():
            raise _DamageError(f"{STATE_FILE} does not match its SHA-256")
        if document["format"] not in (FORMAT, OF_SEVERAL):
            raise _DamageError(
                f"{STATE_FILE} has format {document['format']}, this version reads {FORMAT} and {OF_SEVERAL}"
            )
        for name, expected in document["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                raise _DamageError(f"{name} has {size} bytes instead of {expected['bytes']}")
            if _sha256(folder / name) != expected["sha256"]:
                raise _DamageError(f"{name} does not match its SHA-256")
    except FileNotFoundError as error:
        raise _DamageError(f"{Path(error.filename).name} is missing") from error
    except OSError as error:
        raise _DamageError(f"{error.filename} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamageError(f"{STATE_FILE} is not a state file") from error
    return document


def _read(folder: Path, document: Mapping[str, Any], device: str | torch.device) -> Checkpoint:
    flat: dict[str, dict[str, torch.Tensor]] = {}
    hashes: dict[str, list[str]] = {}
    for name, file in document["files"].items():
        part = _part_of(name)
        try:
            flat.setdefault(part, {}).update(safetensors_torch.load_file(folder / name, device=str(device)))
        except (OSError, SafetensorError, RuntimeError) as error:  # it was there a moment ago; torch opens it
            raise _DamageError(f"{name} cannot be read ({reason(error)})") from error
        hashes.setdefault(part, []).append(file["sha256"])
    try:
        return Checkpoint(
            path=folder,
            step=document["step"],
            tensors={part: decode(tree, flat.get(part, {})) for part, tree in document["structure"].items()},
            state=decode(document["state"], {}),
            model_config=decode(document["model_config"], {}),
            sha256={part: _joint_hash(found) for part, found in hashes.items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _DamageError(f"{STATE_FILE} is not a state file") from error


def _part_of(file: str) -> str:
    """The part of a checkpoint that a file holds, whole or a share of it."""
    match = _FILE.fullmatch(file)
    if match is None:
        raise _DamageError(f"{file} is not a name of this format")
    return match[1]


def _joint_hash(hashes: Sequence[str]) -> str:
    """Of one file its own."""
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _newest_intact(root: Path, excluding: int) -> int | None:
    for step in sorted(steps_in(root), reverse=True):
        folder = folder_of(root, step)
        if step != excluding and folder is not None and _damage(folder) is None:
            return step
    return None


def _damage(folder: Path) -> str | None:
    try:
        _verified_document(folder)
    except _DamageError as error:
        return str(error)
    return None
