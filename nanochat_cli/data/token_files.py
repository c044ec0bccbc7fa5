"""Files of token ids that other programs write: where the ids lie in them, and where documents end.

| format | files | ids | documents |
| --- | --- | --- | --- |
| nanotron, datatrove | X.ds, X.ds.index, X.ds.metadata | uint16 or uint32, raw | uint64 ends, in tokens |
| Megatron | X.bin, X.idx | uint16 or int32, raw | lengths and offsets of sequences, first sequence of each document |
| nanoGPT | X.bin | uint16, raw | an end-of-text id between them |
| llm.c, modded-nanogpt | X.bin | 256 int32 (magic, version, count), then uint16 or uint32 | the same |

All little-endian. As their writers have it: datatrove 0.10.1 `pipeline/tokens/tokenizer.py`, Megatron-LM
`core/datasets/indexed_dataset.py`, nanoGPT `data/openwebtext/prepare.py`, llm.c `dev/data/data_common.py`.
Everything is memory-mapped, so memory does not grow with a file. Knows ids; `token_documents` makes text of them.
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.sections.data import TokenFormat
from nanochat_cli.errors import ConfigError, DataError, reason

SUFFIXES: dict[TokenFormat, str] = {"nanotron": ".ds", "megatron": ".idx", "nanogpt": ".bin", "llmc": ".bin"}
"""Of the file that stands for the others."""
BESIDE = {".ds", ".index", ".metadata", ".loss", ".bin", ".idx"}
TOKENIZER = "tokenizer.json"
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {8: np.dtype("<u2"), 4: np.dtype("<u4")}  # int32, but no id is negative: one that is, is too large
LLMC_HEADER = 256
LLMC_MAGICS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Magic -> version, ids. The second one is llm.c's for Llama 3."""
HEAD_BYTES = 1 << 16


@dataclass(frozen=True)
class TokenFile:
    """`ids` [n], memory-mapped; `ends()`: of each document, in order, or None if only an id between them tells."""

    ids: NDArray[np.unsignedinteger]
    ends: Callable[[], Iterator[int]] | None


def token_files(
    found: Sequence[Path], wanted: Literal["auto", TokenFormat], *, folder: bool
) -> tuple[TokenFormat | None, list[Path]]:
    """The format of one file or those of a folder, None for text, and the files that stand for others (`SUFFIXES`).

    With "auto" a folder has tokens if nothing else is in it. Raises ConfigError for several formats, DataError if a
    format is wanted that none has.
    """
    if not folder:
        form = _format_of(found[0]) if wanted == "auto" else wanted
        return form, [found[0].with_suffix(".idx") if form == "megatron" else found[0]]
    form = _common_format(found) if wanted == "auto" else wanted
    if form is None:
        return None, []
    files = [path for path in found if path.suffix == SUFFIXES[form]]
    if not files:
        raise DataError(f"{found[0].parent}: no {form} file (*{SUFFIXES[form]}) matches data.glob; set data.format")
    return form, files


def companions(path: Path, form: TokenFormat) -> list[Path]:
    """The other files that `path` needs."""
    if form == "nanotron":
        return [path.with_name(path.name + ".index")]
    return [path.with_suffix(".bin")] if form == "megatron" else []


def open_token_file(path: Path, form: TokenFormat) -> TokenFile:
    """Map a file; path: the one that stands for the others. Raises DataError if it is not whole or not of that form."""
    try:
        if form == "nanotron":
            return _nanotron(path)
        if form == "megatron":
            return _megatron(path)
        return TokenFile(_llmc(path) if form == "llmc" else _mapped(path, np.dtype("<u2")), None)
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot read a part of a {form} file: {reason(error)}") from error


# -- recognising -----------------------------------------------------------------------------------------


def _common_format(found: Sequence[Path]) -> TokenFormat | None:
    if any(path.suffix not in BESIDE and path.name != TOKENIZER for path in found):
        return None
    forms: set[TokenFormat | None] = {_format_of(path) for path in found if path.suffix in SUFFIXES.values()}
    if len(forms) > 1 and None not in forms:
        names = " and ".join(sorted(map(str, forms)))
        raise ConfigError(f"{found[0].parent}: holds {names} files; choose with --format (data.format) or --glob")
    return next(iter(forms)) if len(forms) == 1 else None


def _format_of(path: Path) -> TokenFormat | None:
    """By suffix, what lies beside the file and first bytes; None for text, whatever its suffix."""
    if path.suffix == ".ds" and companions(path, "nanotron")[0].exists():
        return "nanotron"
    if path.suffix == ".bin" and path.with_suffix(".idx").exists():
        path = path.with_suffix(".idx")
    if path.suffix not in SUFFIXES.values():
        return None
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {reason(error)}") from error
    if b"\0" not in head:
        return None
    if path.suffix == ".bin":
        return "llmc" if int.from_bytes(head[:4], "little") in LLMC_MAGICS else "nanogpt"
    return "nanotron" if path.suffix == ".ds" else "megatron"


# -- the formats -----------------------------------------------------------------------------------------


def _mapped(path: Path, dtype: np.dtype, offset: int = 0, count: int | None = None) -> NDArray:
    """`count` numbers from byte `offset` on, or all to the end of the file."""
    size = path.stat().st_size - offset
    if count is None and size % dtype.itemsize:
        raise DataError(
            f"{path}: its {size} bytes of ids are no multiple of {dtype.itemsize}: cut short, or another format"
        )
    count = size // dtype.itemsize if count is None else count
    if count * dtype.itemsize > size:
        raise DataError(f"{path}: cut short: {offset + size} bytes, {offset + count * dtype.itemsize} expected")
    if count == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, "r", offset, (count,))


def _nanotron(path: Path) -> TokenFile:
    (index,) = companions(path, "nanotron")
    ends = _mapped(index, np.dtype("<u8"))
    size, tokens = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    width = size // max(tokens, 1)
    if size != tokens * width or (tokens and width not in (2, 4)):
        raise DataError(
            f"{path}: {size} bytes for the {tokens} tokens of its index, neither 2 nor 4 each: cut short, or another's "
            "index"
        )
    metadata = path.with_name(path.name + ".metadata")
    if tokens and metadata.exists():
        said = metadata.read_text(encoding="utf-8", errors="replace").partition("\n")[0].rpartition("|")[2]
        if said.strip() not in ("", str(width)):
            raise DataError(f"{path}: has {width} bytes per token, but {metadata.name} says {said.strip()}: cut short")
    return TokenFile(_mapped(path, np.dtype(f"<u{width or 2}")), lambda: _increasing(path, map(int, ends), tokens))


def _megatron(path: Path) -> TokenFile:
    (tokens,) = companions(path, "megatron")
    layout = struct.Struct("<9sQBQQ")
    with path.open("rb") as file:
        head = file.read(layout.size)
    if len(head) < layout.size or head[: len(MEGATRON_MAGIC)] != MEGATRON_MAGIC:
        raise DataError(f"{path}: not a Megatron index: does not begin with MMIDIDX")
    _, version, code, sequences, documents = layout.unpack(head)
    if version != 1 or code not in MEGATRON_DTYPES:
        raise DataError(
            f"{path}: version {version}, type {code}: only version 1 with uint16 (8) or int32 (4) ids is read"
        )
    offset = layout.size
    lengths = _mapped(path, np.dtype("<i4"), offset, sequences)
    pointers = _mapped(path, np.dtype("<i8"), offset := offset + 4 * sequences, sequences)
    first = _mapped(path, np.dtype("<i8"), offset + 8 * sequences, documents)
    ids = _mapped(tokens, MEGATRON_DTYPES[code])

    def ends() -> Iterator[int]:
        end = sequence = 0
        for last in map(int, first[1:]):
            some = lengths[sequence:last].astype(np.int64)
            stops = end + some.cumsum()
            if (pointers[sequence:last] != ids.itemsize * (stops - some)).any():
                raise DataError(f"{path}: damaged: its offsets are not the sums of its lengths")
            end, sequence = int(stops[-1]) if len(stops) else end, max(sequence, last)
            yield end

    return TokenFile(ids, lambda: _increasing(path, ends(), len(ids)))


def _llmc(path: Path) -> NDArray:
    header = np.fromfile(path, "<i4", LLMC_HEADER)
    if len(header) < LLMC_HEADER or int(header[0]) not in LLMC_MAGICS:
        raise DataError(f"{path}: not an llm.c file: does not begin with {' or '.join(map(str, LLMC_MAGICS))}")
    version, dtype = LLMC_MAGICS[int(header[0])]
    if header[1] != version:
        raise DataError(f"{path}: version {header[1]} of magic {header[0]}: only version {version} is read")
    ids = _mapped(path, dtype, header.nbytes)
    if len(ids) != header[2]:
        raise DataError(f"{path}: holds {len(ids)} tokens, but its header says {header[2]}: cut short")
    return ids


def _increasing(path: Path, ends: Iterator[int], tokens: int) -> Iterator[int]:
    """The ends, once they are known not to decrease and to cover all tokens."""
    before = 0
    for end in ends:
        if not before <= end <= tokens:
            raise DataError(f"{path}: damaged: a document from token {before} to {end} of {tokens}")
        yield end
        before = end
    if before != tokens:
        raise DataError(f"{path}: its documents end at token {before}, but there are {tokens}")
