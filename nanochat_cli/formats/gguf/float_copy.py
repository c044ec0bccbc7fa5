"""A GGUF file once more with float32 tensors, and all else as it is.

llama.cpp computes such a copy without rounding activations, so that it can be compared exactly with what we make of the
original. Knows nothing of models: every key is copied, also those that we do not read, except the tensors' checksum.
"""

from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from nanochat_cli.errors import DataError
from nanochat_cli.formats.gguf.checksum import KEY as CHECKSUM
from nanochat_cli.formats.gguf.file import rows_of
from nanochat_cli.formats.gguf.write import write_tensors

_OWN = ("general.architecture", "general.alignment", CHECKSUM)
"""Keys that the writer sets itself, or that are true of the original only."""


def write_float_copy(source: Path, out: Path) -> None:
    """Write `source` to `out`, every tensor as float32. Raises DataError if `out` cannot be written."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(None, str(arch))
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key not in _OWN:
            kind = entry.types[0]
            inner = entry.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(key, entry.contents(), kind, inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(rows_of(tensor), tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.reshape(tensor.shape[::-1].tolist())))
    try:
        writer.write_header_to_file(out)
        writer.write_kv_data_to_file()
        write_tensors(writer)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; free space") from error
    finally:
        writer.close()
