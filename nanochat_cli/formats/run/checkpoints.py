"""Checkpoints: `RUN/checkpoints/step-000500/{model,optimizer,…}.safetensors + state.json`, and two pointer files.

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
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch

from nanochat_cli.atomic_write import sync
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.run.state_tree import decode, encode
from nanochat_cli.nesting import parse_json

Pointer = Literal["latest", "best"]
Which = Pointer | int

FORMAT = 1
STATE_FILE = "state.json"
_TEMPORARY = ".tmp-"
_REPLACED = ".replaced-"
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
    """Of every file of tensors, by its part."""


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
    files: dict[str, dict[str, torch.Tensor]] = {}
    structure: dict[str, Any] = {}
    for part, tree in tensors.items():
        flat: dict[str, torch.Tensor] = {}
        structure[part] = encode(tree, (), flat)
        if flat:
            files[f"{part}.safetensors"] = flat
    document: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "model_fingerprint": fingerprint(model_config),
        "model_config": encode(model_config, ("model_config",), None),
        "state": encode(state, ("state",), None),
        "structure": structure,
    }

    root = _root(run_dir)
    final = root / _name(step)
    temporary = root / (_TEMPORARY + final.name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _finish_replacements(root)
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir()
        document["files"] = {name: _write_tensors(temporary / name, flat) for name, flat in files.items()}
        _write_text(temporary / STATE_FILE, _seal(document))
        sync(temporary)
        replaced = root / (_REPLACED + final.name)
        if final.exists():
            final.rename(replaced)
        temporary.rename(final)
        sync(root)
        _point(root, "latest", step)
        if best:
            _point(root, "best", step)
        if replaced.exists():
            shutil.rmtree(replaced)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        kept = _pointed_step(root, "latest")
        intact = "there is no earlier checkpoint" if kept is None else f"the checkpoint of step {kept} is intact"
        raise DataError(
            f"cannot save the checkpoint of step {step} in {root}: {reason(error)}; {intact}; "
            "free space, or choose another run.dir"
        ) from error
    return final


def load(run_dir: Path, which: Which = "latest", *, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads the checkpoint that a pointer names, or that of a step; every file is checked against its SHA-256.

    Raises DataError when there is none, or when it is damaged; the message then names the newest intact one.
    """
    root = _root(run_dir)
    while True:
        step = which if isinstance(which, int) else _named_step(root, which)
        folder = _folder(root, step)
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
    step = _pointed_step(root, pointer)
    if step is None:
        raise DataError(f"{root}: no `{pointer}` checkpoint ({_known(root)}); train first, or name a saved step")
    return step


def _identity(root: Path, which: Which) -> tuple[int | None, int | None]:
    """Changes when the checkpoint that `which` means becomes another one."""
    step = which if isinstance(which, int) else _pointed_step(root, which)
    try:
        return step, None if step is None else (root / _name(step)).stat().st_ino
    except FileNotFoundError:
        return step, None


def _unreadable(root: Path, step: int, folder: Path | None, damage: "_DamageError | None") -> DataError:
    """What is wrong with a checkpoint that was asked for, and which one to take instead."""
    if folder is None:
        return DataError(f"{root}: there is no checkpoint of step {step} ({_known(root)})")
    intact = _newest_intact(root, excluding=step)
    advice = (
        f"the newest intact one is step {intact}: to go on from it, write {_name(intact)} into {root / 'latest'}"
        if intact is not None
        else "no other is intact"
    )
    return DataError(f"{folder} is damaged: {damage}; {advice}")


def _known(root: Path) -> str:
    return f"saved steps: {', '.join(str(step) for step in sorted(_steps(root))) or 'none'}"


def steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return sorted(_steps(_root(run_dir)))


def latest_step(run_dir: Path) -> int | None:
    """Step that `latest` names, or None when nothing has been saved."""
    return _pointed_step(_root(run_dir), "latest")


def is_empty(run_dir: Path) -> bool:
    """Whether no save has ever finished. One folder without a pointer is a first save that a crash cut short."""
    return latest_step(run_dir) is None and len(steps(run_dir)) <= 1


def prune(run_dir: Path, keep_last: int, best_step: int | None = None) -> list[int]:
    """Removes all but the last `keep_last`, `best_step` and what the pointers name; returns the steps removed.

    Also removes what interrupted saves left behind. Steps above `latest` (of a run that was continued from an earlier
    checkpoint) are neither counted nor removed: the run writes over them when it gets there.
    """
    root = _root(run_dir)
    pointed = {_pointed_step(root, "latest"), _pointed_step(root, "best")}
    newest = _pointed_step(root, "latest")
    try:
        _finish_replacements(root)
        for pattern in (_TEMPORARY + "*", _REMOVED + "*"):
            for leftover in root.glob(pattern):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        past = [step for step in sorted(_steps(root)) if newest is None or step <= newest]
        keep = {*past[-keep_last:], *pointed, best_step}
        removed = [step for step in past if step not in keep]
        for step in removed:
            # Renamed first: a folder that is half removed never looks like a checkpoint.
            doomed = root / (_REMOVED + _name(step))
            (root / _name(step)).rename(doomed)
            shutil.rmtree(doomed)
    except OSError as error:
        raise DataError(f"cannot remove old checkpoints in {root}: {error.strerror}; check its permissions") from error
    return removed


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a plain configuration."""
    return hashlib.sha256(_canonical(encode(config, (), None))).hexdigest()


def require_same_model(
    checkpoint: Checkpoint, model_config: Mapping[str, Any], model_state: Mapping[str, torch.Tensor]
) -> None:
    """Raises DataError naming the first configuration key, or else the first tensor, in which the two models differ.

    A key that the checkpoint lacks (it was added to the schema later) is not compared; the tensors still are.
    """
    difference = _first_difference(checkpoint.model_config, model_config, "model")
    if difference is None:
        difference = _first_tensor_difference(checkpoint.tensors.get("model", {}), model_state)
    if difference is not None:
        raise DataError(
            f"{checkpoint.path} holds another model: {difference}; use the configuration it was trained with"
        )


def require_same_part(
    where: object, part: str, there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]
) -> None:
    """Raises DataError naming the first tensor in which a saved part of a run is not what is here."""
    difference = _first_tensor_difference(there, here)
    if difference is not None:
        raise DataError(f"{where} holds another {part}: {difference}; use the [{part}] settings it was trained with")


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


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


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
        if document["format"] != FORMAT:
            raise _DamageError(f"{STATE_FILE} has format {document['format']}, this version reads {FORMAT}")
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
    parts: dict[str, Any] = {}
    for part, tree in document["structure"].items():
        name = f"{part}.safetensors"
        try:
            flat = safetensors_torch.load_file(folder / name, device=str(device)) if name in document["files"] else {}
        except (OSError, SafetensorError) as error:  # it was there a moment ago
            raise _DamageError(f"{name} cannot be read ({reason(error)})") from error
        parts[part] = decode(tree, flat)
    return Checkpoint(
        path=folder,
        step=document["step"],
        tensors=parts,
        state=decode(document["state"], {}),
        model_config=decode(document["model_config"], {}),
        sha256={name.removesuffix(".safetensors"): file["sha256"] for name, file in document["files"].items()},
    )


# --- folders and pointers -----------------------------------------------------------------------------------------


def _root(run_dir: Path) -> Path:
    return Path(run_dir) / "checkpoints"


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _step_of(name: str) -> int | None:
    number = name.removeprefix("step-")
    return int(number) if number != name and number.isdecimal() else None


def _steps(root: Path) -> Iterator[int]:
    names = {path.name.removeprefix(_REPLACED) for path in root.iterdir()} if root.is_dir() else set()
    return (step for name in names if (step := _step_of(name)) is not None)


def _folder(root: Path, step: int) -> Path | None:
    """Folder of a step; the replaced one stands in when a crash hit between the two renames of `save`."""
    candidates = (root / _name(step), root / (_REPLACED + _name(step)))
    return next((folder for folder in candidates if folder.is_dir()), None)


def _finish_replacements(root: Path) -> None:
    """After a crash inside the replacement of a step: puts the old folder back, or removes it for the new one."""
    for replaced in root.glob(_REPLACED + "*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(final)


def _point(root: Path, pointer: Pointer, step: int) -> None:
    temporary = root / (_TEMPORARY + pointer)
    _write_text(temporary, _name(step) + "\n")
    temporary.replace(root / pointer)
    sync(root)


def _pointed_step(root: Path, pointer: Pointer) -> int | None:
    try:
        name = (root / pointer).read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{root / pointer} cannot be read: {error.strerror}; check its permissions") from error
    step = _step_of(name)
    if step is None:
        raise DataError(f"{root / pointer} holds {name[:40]!r}; write the name of a checkpoint folder into it")
    return step


def _newest_intact(root: Path, excluding: int) -> int | None:
    for step in sorted(_steps(root), reverse=True):
        folder = _folder(root, step)
        if step != excluding and folder is not None and _is_intact(folder):
            return step
    return None


def _is_intact(folder: Path) -> bool:
    try:
        _verified_document(folder)
    except _DamageError:
        return False
    return True


# --- recognising another model ------------------------------------------------------------------------------------


def _first_difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str) -> str | None:
    for key, value in there.items():
        name = f"{prefix}.{key}"
        if key not in here:
            return f"{name} = {value!r} is unknown here"
        other = here[key]
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if (difference := _first_difference(value, other, name)) is not None:
                return difference
        elif value != other:
            return f"{name} is {value!r} there and {other!r} here"
    return None


def _first_tensor_difference(there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> str | None:
    for name, tensor in here.items():
        if name not in there:
            return f"it has no tensor {name} {list(tensor.shape)}"
        if there[name].shape != tensor.shape:
            return f"tensor {name} is {list(there[name].shape)} there and {list(tensor.shape)} here"
    extra = next((name for name in there if name not in here), None)
    return None if extra is None else f"its tensor {extra} {list(there[extra].shape)} has no place here"
