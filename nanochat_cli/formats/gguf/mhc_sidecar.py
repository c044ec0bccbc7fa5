"""The `.mhc` file beside an export of static hyper-connections: their coefficients, for other runtimes.

Little-endian: magic 0x6D484321, version 2, streams, sublayers (uint32 each); then per sublayer float32

    2 streams, 36 bytes:   alpha logit; pre logits 2, pre bias 2, post logits 2, post bias 2
    4 streams, 160 bytes:  24 logits of the permutations; pre logits 4, pre bias 4, post logits 4, post bias 4

pre = σ(logits + bias), post = 2 σ(logits + bias); we write only biases, and logits of 0. With two streams the identity
has the weight σ(alpha logit). Permutations are in lexicographic order, the identity first.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.model.transformer import Transformer

MAGIC = 0x6D484321
VERSION = 2
_HEADER = struct.Struct("<4I")


@dataclass(frozen=True)
class StaticMix:
    """One sublayer: res_logits float32 [n!], pre and post float32 [n], before the sigmoid."""

    res_logits: NDArray[np.float32]
    pre: NDArray[np.float32]
    post: NDArray[np.float32]


def record_size(streams: int) -> int:
    """Floats per sublayer."""
    return 9 if streams == 2 else math.factorial(streams) + 4 * streams


def write_sidecar(model: Transformer, out: Path) -> None:
    """Raises ConfigError for a model without static hyper-connections, DataError if `out` cannot be written."""
    mixes = [mix for _, mix in model.hyper_connections()]
    if not mixes or mixes[0].dynamic:
        raise ConfigError("only static hyper-connections (model.mhc.dynamic = false) fit a .mhc file")
    n = mixes[0].streams
    data = bytearray(_HEADER.pack(MAGIC, VERSION, n, len(mixes)))
    nothing = np.zeros(n, dtype="<f4")
    for mix in mixes:
        res, pre, post = (p.detach().cpu().numpy().astype("<f4") for p in (mix.res_bias, mix.pre_bias, mix.post_bias))
        mixing = res[:1] - res[1:] if n == 2 else res
        record = np.concatenate([mixing, nothing, pre, nothing, post]).astype("<f4")
        assert len(record) == record_size(n)
        data += record.tobytes()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, bytes(data))
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror}; free space or choose another --out") from error


def read_sidecar(path: Path) -> list[StaticMix]:
    """Raises DataError for any other file, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if len(data) < _HEADER.size:
        raise DataError(f"{path} is too short for a .mhc file")
    magic, version, n, count = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or n not in (2, 4):
        raise DataError(f"{path}: magic {magic:#x}, version {version}, {n} streams: not a .mhc file that we read")
    if len(data) != _HEADER.size + 4 * count * record_size(n):
        raise DataError(f"{path} has {len(data)} bytes, which do not hold {count} sublayers: it is damaged")
    records = np.frombuffer(data, dtype="<f4", offset=_HEADER.size).reshape(count, -1)
    return [_split(record, n) for record in records]


def _split(record: NDArray[np.float32], n: int) -> StaticMix:
    size = len(record) - 4 * n
    mixing, rest = record[:size], record[size:].reshape(4, n)
    res = np.array([mixing[0], 0], dtype=np.float32) if n == 2 else mixing
    return StaticMix(res, rest[0] + rest[1], rest[2] + rest[3])
