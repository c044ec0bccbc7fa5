"""Whether a checkpoint is of the model, or of another part of a run, that is here, and the first difference if not."""

from collections.abc import Mapping
from typing import Any

import torch

from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.checkpoints import Checkpoint


def require_same_model(
    checkpoint: Checkpoint, model_config: Mapping[str, Any], model_state: Mapping[str, torch.Tensor]
) -> None:
    """Raises DataError naming the first configuration key, or else the first tensor, in which the two models differ.

    A key that the checkpoint lacks (it was added to the schema later) is not compared; the tensors still are.
    """
    weights = checkpoint.tensors.get("model", {})
    difference = first_difference(checkpoint.model_config, model_config, weights, model_state)
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


def first_difference(
    config_there: Mapping[str, Any],
    config_here: Mapping[str, Any],
    there: Mapping[str, torch.Tensor],
    here: Mapping[str, torch.Tensor],
) -> str | None:
    """The first key of [model], or else the first tensor, in which two models differ, in words; None if in none."""
    found = _first_key_difference(config_there, config_here, "model")
    return _first_tensor_difference(there, here) if found is None else found


def _first_key_difference(there: Mapping[str, Any], here: Mapping[str, Any], prefix: str) -> str | None:
    for key, value in there.items():
        name = f"{prefix}.{key}"
        if key not in here:
            return f"{name} = {value!r} is unknown here"
        other = here[key]
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if (difference := _first_key_difference(value, other, name)) is not None:
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
