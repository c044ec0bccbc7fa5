"""The SHA-256 of a file's tensors, in its metadata: whether a copy still holds what was exported.

Covered are names, types, shapes and stored bytes of all tensors, and no other metadata, so that a name or a licence may
be added to a file. Hashed for each tensor, in the order of their names: one line of JSON, `[name, type, shape, bytes]`
(type as gguf names it, shape with the rows first, the number of bytes), a line feed, and the bytes as they are stored.

Whoever reads all tensors checks it (`formats.gguf.read`), since hashing bytes costs less than unpacking them. Whoever
reads only metadata does not.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.file import GGUFFile

KEY = "nanochat.tensors.sha256"

Described = tuple[str, str, Sequence[int], NDArray[Any]]
"""Name, type, shape with the rows first, stored values."""


def add_checksum(writer: GGUFWriter) -> None:
    """Add the key for the tensors that a writer holds."""
    tensors = ((name, info) for part in writer.tensors for name, info in part.items())
    described = [(name, i.dtype.name, i.shape, i.tensor) for name, i in tensors if i.tensor is not None]
    writer.add_string(KEY, sha256_of(described))


def checksum_of(file: GGUFFile) -> str:
    """The SHA-256 of the tensors that a file holds now, in hexadecimal digits."""
    return sha256_of((name, t.tensor_type.name, t.shape.tolist()[::-1], t.data) for name, t in file.tensors.items())


def sha256_of(tensors: Iterable[Described]) -> str:
    """The hash that the module describes."""
    total = hashlib.sha256()
    for name, type_name, shape, values in sorted(tensors, key=lambda tensor: tensor[0]):
        stored = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        total.update(json.dumps([name, type_name, [int(n) for n in shape], stored.nbytes]).encode() + b"\n")
        total.update(stored.data)
    return total.hexdigest()


def is_intact(file: GGUFFile) -> bool | None:
    """Whether the tensors are those that were exported; None for a file that does not say."""
    said = file.fields.get(KEY)
    return None if said is None else said == checksum_of(file)


def require_intact(file: GGUFFile) -> None:
    """Raise DataError for tensors that are not those that were exported; a file that does not say passes."""
    if is_intact(file) is False:
        raise DataError(
            f"{file.path}: its tensors do not match {KEY}: damaged, or changed by another program; "
            "export or download it again"
        )
