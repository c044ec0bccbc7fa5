"""Token files written by hand, as the programs that they belong to document them."""

import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.data.corpora import random_text

TEXTS = [random_text(random.Random(number), 40 + 15 * number) for number in range(12)]

Documents = Sequence[Sequence[int]]


def write_nanotron(folder: Path, documents: Documents, eot: int, width: str = "H") -> Path:
    """uint16 ("H") or uint32 ("I") ids, uint64 ends; as datatrove, with an end-of-text id after each document."""
    path, ends, ids = folder / "tokens.ds", [], []
    for document in documents:
        ids += [*document, eot]
        ends.append(len(ids))
    path.write_bytes(struct.pack(f"<{len(ids)}{width}", *ids))
    (folder / "tokens.ds.index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    return path


def write_megatron(folder: Path, documents: Documents, eot: int, width: str = "H") -> Path:
    """Every document is cut into sequences of at most 7 tokens, since a document may have several."""
    path, lengths, first, ids = folder / "tokens.idx", [], [0], []
    for document in documents:
        tokens = [*document, eot]
        lengths += [len(tokens[start : start + 7]) for start in range(0, len(tokens), 7)]
        first.append(len(lengths))
        ids += tokens
    size = struct.calcsize(width)
    offsets = [size * sum(lengths[:number]) for number in range(len(lengths))]
    path.with_suffix(".bin").write_bytes(struct.pack(f"<{len(ids)}{width}", *ids))
    path.write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", {"H": 8, "i": 4}[width])
        + struct.pack("<QQ", len(lengths), len(first))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *offsets)
        + struct.pack(f"<{len(first)}q", *first)
    )
    return path


def write_nanogpt(folder: Path, documents: Documents, eot: int, width: str = "H") -> Path:
    """Only ids; the end-of-text id follows each document."""
    assert width == "H"
    path = folder / "tokens.bin"
    np.array([token for document in documents for token in [*document, eot]], dtype="<u2").tofile(path)
    return path


def write_llmc(folder: Path, documents: Documents, eot: int, width: str = "H") -> Path:
    """The header of llm.c's `write_datafile`; the end-of-text id precedes each document."""
    path = folder / "tokens.bin"
    ids = [token for document in documents for token in [eot, *document]]
    magic, version = {"H": (20240520, 1), "I": (20240801, 7)}[width]
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{width}", *ids))
    return path


WRITERS = {"nanotron": write_nanotron, "megatron": write_megatron, "nanogpt": write_nanogpt, "llmc": write_llmc}
