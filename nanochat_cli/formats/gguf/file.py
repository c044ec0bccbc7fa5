"""Reading a GGUF file: metadata as plain values, tensors by name, and one clear error for a bad file.

A thin layer over gguf's reader, which raises errors of all kinds. Knows nothing of models.
"""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from numpy.typing import NDArray

from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.packing import Q2_0

MAGIC = b"GGUF"


class GGUFFile:
    """An open file: `fields` (metadata, plain values) and `tensors` (memory-mapped, by name). Raises DataError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _read(path)
        self.fields: dict[str, Any] = {}
        try:
            for key, entry in reader.fields.items():
                if not key.startswith("GGUF."):
                    self.fields[key] = entry.contents()
        except (ValueError, IndexError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: the metadata is damaged ({error}); export or download the file again") from error
        self.tensors: dict[str, ReaderTensor] = {tensor.name: tensor for tensor in reader.tensors}
        _check_layout(path, reader)


class _BoundedReader(GGUFReader):
    """Refuses what lies beyond the end, which gguf's reader takes for empty: an array of 2⁶⁰ would be read for ever."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *order: Any, **named: Any) -> NDArray[Any]:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it needs {end} bytes and has {len(self.data)}")
        return super()._get(offset, dtype, count, *order, **named)


def _read(path: Path) -> GGUFReader:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if start != MAGIC:
        raise DataError(f"{path} is not a GGUF file (it starts with {start!r})")
    try:
        return _BoundedReader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        # gguf has no error class: a truncated file surfaces as an index or a shape that does not fit.
        raise DataError(
            f"{path} is damaged or incomplete ({_first_line(error)}); export or download it again"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _check_layout(path: Path, reader: GGUFReader) -> None:
    """Every tensor must end where the next begins, give or take the padding.

    Files of a fork use type 42 with blocks of 128 weights in 34 bytes where ours has 64 in 18: read as Q2_0 they
    would be noise, and only the sizes reveal it.
    """
    size = path.stat().st_size
    ordered = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    ends = [int(tensor.data_offset) for tensor in ordered[1:]] + [size]
    for tensor, end in zip(ordered, ends, strict=True):
        room = end - int(tensor.data_offset)
        if not tensor.n_bytes <= room < tensor.n_bytes + reader.alignment:
            hint = " (a type-42 file with blocks of 128?)" if tensor.tensor_type == Q2_0 else ""
            raise DataError(
                f"{path}: tensor {tensor.name} has {room} bytes where its type needs {tensor.n_bytes}{hint}"
            )


def rows_of(tensor: ReaderTensor) -> NDArray[Any]:
    """The stored values, a stack of matrices [E, N, K] as its rows [E · N, K]."""
    data = np.array(tensor.data)
    return data.reshape(-1, data.shape[-1]) if data.ndim == 3 else data


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
