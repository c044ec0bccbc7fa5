"""Ternary codes and scales to ggml block bytes, and back, without loss.

Knows the byte layout of the four ggml types that can hold a ternary matrix exactly. A weight is
`code × scale` with a code in {-1, 0, 1} and an f16 scale; both are copied as they are, never
re-quantised from a float weight, so that the file holds what was trained. Knows nothing of
tensor names, models or files.

Layouts (ggml-common.h, ggml-quants.c of llama.cpp; K runs along the row, d is the f16 scale):

    type   block  bytes  layout
    TQ1_0   256     54   48 + 4 bytes of base-3 digits (5 and 4 codes per byte), then d
    TQ2_0   256     66   plane-128 of nanochat_kernels: two halves of 128 codes, 2 bits each, then d
    Q2_0     64     18   d, then 16 bytes of four consecutive codes, 2 bits each
    Q4_0     32     18   d, then 16 bytes: code i in the low nibble, code i + 16 in the high one, +8

TQ1_0, TQ2_0 and Q2_0 store code + 1; Q4_0 stores code + 8.
"""

from collections.abc import Callable
from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from nanochat_cli.errors import ConfigError, DataError
from nanochat_kernels import pack_plane128

Codes = NDArray[np.int8]
"""[N, K], values -1, 0, 1."""
Scales = NDArray[np.float16]
"""[N, blocks], one per block of a row."""
Bytes = NDArray[np.uint8]


def _declare_ggml_type(name: str, value: int, block: int, block_bytes: int) -> GGMLQuantizationType:
    """Return the ggml type `value`, adding it to gguf's enum if the installed gguf is older than the type.

    gguf 0.19.0 on PyPI lacks Q2_0 although the gguf 0.19.0 inside llama.cpp has it, so the version number
    says nothing; only the enum does. The reader raises ValueError on an id that the enum lacks.
    """
    try:
        return GGMLQuantizationType(value)
    except ValueError:
        member = int.__new__(GGMLQuantizationType, value)
        member._name_, member._value_ = name, value
        GGMLQuantizationType._member_map_[name] = member
        GGMLQuantizationType._value2member_map_[value] = member
        GGMLQuantizationType._member_names_.append(name)
        gguf.constants.GGML_QUANT_SIZES[member] = (block, block_bytes)
        return member


Q2_0 = _declare_ggml_type("Q2_0", 42, 64, 18)


@dataclass(frozen=True)
class TernaryType:
    """One ggml type that holds ternary blocks: its geometry and its codec on whole blocks."""

    name: str
    ggml_type: GGMLQuantizationType
    block: int
    """Codes per block, consecutive along K."""
    block_bytes: int
    scale_first: bool
    encode: Callable[[NDArray[np.uint8]], Bytes]
    """[..., block] of code + 1 -> [..., block_bytes - 2]"""
    decode: Callable[[Bytes], NDArray[np.uint8]]
    """The inverse; a value above 2 is not a ternary code."""

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


_TWO_BITS: NDArray[np.uint8] = np.array([0, 2, 4, 6], dtype=np.uint8)
"""Shifts of the four codes in a byte."""


def _encode_tq2_0(digits: NDArray[np.uint8]) -> Bytes:
    codes = torch.from_numpy(digits.reshape(-1, 256).astype(np.int8) - np.int8(1))
    return pack_plane128(codes).numpy().reshape(*digits.shape[:-1], 64)


def _decode_tq2_0(packed: Bytes) -> NDArray[np.uint8]:
    halves = packed.reshape(*packed.shape[:-1], 2, 1, 32)
    return (halves >> _TWO_BITS[:, None] & np.uint8(3)).reshape(*packed.shape[:-1], 256)


_TQ1_0_PARTS = ((160, 5), (80, 5), (16, 4))
"""Codes in each of the three parts of a TQ1_0 block, and base-3 digits per byte of it."""


def _encode_tq1_0(digits: NDArray[np.uint8]) -> Bytes:
    parts: list[Bytes] = []
    start = 0
    for n_codes, per_byte in _TQ1_0_PARTS:
        part = digits[..., start : start + n_codes].reshape(*digits.shape[:-1], per_byte, n_codes // per_byte)
        start += n_codes
        powers = np.array([3 ** (4 - i) for i in range(per_byte)], dtype=np.uint16).reshape(per_byte, 1)
        value = (part * powers).sum(axis=-2, dtype=np.uint16)
        # The value / 243 is stored as a fraction of 256, rounded up: a multiplication by 3 then pushes a digit out.
        parts.append(((value * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8))
    return np.concatenate(parts, axis=-1)


def _decode_tq1_0(packed: Bytes) -> NDArray[np.uint8]:
    parts: list[NDArray[np.uint8]] = []
    start = 0
    for n_codes, per_byte in _TQ1_0_PARTS:
        n_bytes = n_codes // per_byte
        part = packed[..., None, start : start + n_bytes]
        start += n_bytes
        powers = np.array([3**i for i in range(per_byte)], dtype=np.uint8).reshape(per_byte, 1)
        shifted = (part * powers).astype(np.uint16)  # uint8 product: wraps on purpose, which drops the digits before
        parts.append((shifted * np.uint16(3) >> np.uint16(8)).astype(np.uint8).reshape(*packed.shape[:-1], n_codes))
    return np.concatenate(parts, axis=-1)


def _encode_q2_0(digits: NDArray[np.uint8]) -> Bytes:
    return np.bitwise_or.reduce(digits.reshape(*digits.shape[:-1], 16, 4) << _TWO_BITS, axis=-1)


def _decode_q2_0(packed: Bytes) -> NDArray[np.uint8]:
    return (packed[..., None] >> _TWO_BITS & np.uint8(3)).reshape(*packed.shape[:-1], 64)


def _encode_q4_0(digits: NDArray[np.uint8]) -> Bytes:
    halves = digits.reshape(*digits.shape[:-1], 2, 16) + np.uint8(7)
    return halves[..., 0, :] | halves[..., 1, :] << np.uint8(4)


def _decode_q4_0(packed: Bytes) -> NDArray[np.uint8]:
    nibbles = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    return nibbles - np.uint8(7)  # nibbles below 7 wrap to large values, which the caller rejects


TERNARY_TYPES: dict[str, TernaryType] = {
    t.name: t
    for t in (
        TernaryType("tq2_0", GGMLQuantizationType.TQ2_0, 256, 66, False, _encode_tq2_0, _decode_tq2_0),
        TernaryType("tq1_0", GGMLQuantizationType.TQ1_0, 256, 54, False, _encode_tq1_0, _decode_tq1_0),
        TernaryType("q2_0", Q2_0, 64, 18, True, _encode_q2_0, _decode_q2_0),
        TernaryType("q4_0", GGMLQuantizationType.Q4_0, 32, 18, True, _encode_q4_0, _decode_q4_0),
    )
}


def block_scales(scales: NDArray[np.float32], n_rows: int, n_columns: int, block: int) -> Scales | None:
    """The scale of every block of `block` codes, or None if a block would need more than one.

    scales: [1, 1] (tensor), [N, 1] (row) or [N, K / g] (groups of g), exactly representable in f16.
    Returns f16 [N, K / block]. None also if K is not a multiple of the block.
    """
    if n_columns % block:
        return None
    halves = scales.astype(np.float16)
    if not np.array_equal(halves.astype(np.float32), scales):
        raise ValueError("scales must be rounded to f16 where they are computed, or the file differs from the model")
    n_blocks, n_groups = n_columns // block, halves.shape[1]
    halves = np.broadcast_to(halves, (n_rows, n_groups))
    if n_blocks % n_groups == 0:
        return np.repeat(halves, n_blocks // n_groups, axis=1)
    if n_groups % n_blocks == 0:
        per_block = halves.reshape(n_rows, n_blocks, n_groups // n_blocks)
        return per_block[..., 0].copy() if (per_block == per_block[..., :1]).all() else None
    # Groups and blocks that do not nest (say 192 and 256): compare element by element.
    elements = np.repeat(halves, n_columns // n_groups, axis=1).reshape(n_rows, n_blocks, block)
    return elements[..., 0].copy() if (elements == elements[..., :1]).all() else None


def fitting_types(scales: NDArray[np.float32], n_rows: int, n_columns: int) -> list[str]:
    """Names of the ternary types that hold a [N, K] matrix with these scales exactly."""
    return [t.name for t in TERNARY_TYPES.values() if block_scales(scales, n_rows, n_columns, t.block) is not None]


def pack(type_name: str, codes: Codes, scales: NDArray[np.float32], what: str = "matrix") -> Bytes:
    """Pack codes [N, K] and scales ([1, 1], [N, 1] or [N, G]) into uint8 [N, K / block · block_bytes].

    `what` names the matrix in the error. Raises ConfigError if the type cannot hold it exactly.
    """
    ternary_type = TERNARY_TYPES[type_name]
    n_rows, n_columns = codes.shape
    per_block = block_scales(scales, n_rows, n_columns, ternary_type.block)
    if per_block is None:
        raise ConfigError(_refusal(ternary_type, scales, n_rows, n_columns, what))
    if codes.size and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"{what}: codes must be -1, 0 or 1")
    n_blocks = n_columns // ternary_type.block
    payload = ternary_type.encode((codes + 1).astype(np.uint8).reshape(n_rows, n_blocks, ternary_type.block))
    d = np.ascontiguousarray(per_block).view(np.uint8).reshape(n_rows, n_blocks, 2)
    parts = (d, payload) if ternary_type.scale_first else (payload, d)
    return np.concatenate(parts, axis=-1).reshape(n_rows, n_blocks * ternary_type.block_bytes)


def _refusal(ternary_type: TernaryType, scales: NDArray[np.float32], n_rows: int, n_columns: int, what: str) -> str:
    if n_columns % ternary_type.block:
        why = f"its {n_columns} columns are not a multiple of the block of {ternary_type.block}"
    else:
        why = f"its scale is not constant within a block of {ternary_type.block}"
    would_fit = ", ".join([*fitting_types(scales, n_rows, n_columns), "f16"])
    return f"{what} does not fit {ternary_type.name}: {why}; types that hold it exactly: {would_fit} (or --type auto)"


def unpack(type_name: str, packed: Bytes, what: str = "matrix") -> tuple[Codes, Scales]:
    """The inverse of `pack`: uint8 [N, bytes of a row] -> codes int8 [N, K], scales f16 [N, K / block].

    Raises DataError if a stored value is not a ternary code (the file was quantised from a float model).
    """
    ternary_type = TERNARY_TYPES[type_name]
    n_rows = packed.shape[0]
    blocks = packed.reshape(n_rows, -1, ternary_type.block_bytes)
    payload, d = (
        (blocks[..., 2:], blocks[..., :2]) if ternary_type.scale_first else (blocks[..., :-2], blocks[..., -2:])
    )
    digits = ternary_type.decode(np.ascontiguousarray(payload))
    if digits.size and digits.max() > 2:
        raise DataError(f"{what} ({type_name}) holds values other than -1, 0 and 1 times a scale: not a ternary model")
    codes = digits.astype(np.int8) - np.int8(1)
    scales = np.ascontiguousarray(d).view(np.float16).reshape(n_rows, -1)
    return codes.reshape(n_rows, -1), scales
