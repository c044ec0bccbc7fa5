"""Nested dictionaries of tensors and plain values as strict JSON with references, and back without loss.

Knows types, not files: tuples stay tuples, integer keys stay integers, floats come back bit for bit, and the ones that
JSON lacks (NaN, infinities) are spelled out.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch


def encode(node: Any, path: tuple[str, ...], tensors: dict[str, torch.Tensor] | None) -> Any:
    """JSON form of a nested value; tensors go to `tensors` under their path, joined by "/", and leave a reference.

    node: nested mappings (keys str, int or bool), lists and tuples of tensors, None, bool, int, float, str.
    tensors: filled in place; None forbids tensors. Raises TypeError, naming the path, for anything else.
    """
    if isinstance(node, torch.Tensor):
        if tensors is None:
            raise TypeError(f"{'/'.join(path)}: a tensor belongs in `tensors`, not in the state")
        name = "/".join(path)
        if name in tensors:
            raise TypeError(f"two tensors have the key {name!r}")
        tensors[name] = node
        return {"$tensor": name}
    if isinstance(node, float) and not math.isfinite(node):
        return {"$float": repr(node)}
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, tuple):
        return {"$tuple": [encode(item, (*path, str(i)), tensors) for i, item in enumerate(node)]}
    if isinstance(node, list):
        return [encode(item, (*path, str(i)), tensors) for i, item in enumerate(node)]
    if isinstance(node, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in node):
            return {key: encode(value, (*path, key), tensors) for key, value in node.items()}
        if all(isinstance(key, bool | int | str) for key in node):
            return {"$items": [[key, encode(value, (*path, str(key)), tensors)] for key, value in node.items()]}
        raise TypeError(f"{'/'.join(path)}: keys must be strings or integers")
    raise TypeError(f"{'/'.join(path)}: cannot save a {type(node).__name__}; only tensors and plain values")


def decode(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Inverse of `encode`; tensors: by the names in the references."""
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    match node:
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(decode(item, tensors) for item in items)
        case {"$items": items}:
            return {key: decode(value, tensors) for key, value in items}
    return {key: decode(value, tensors) for key, value in node.items()}
