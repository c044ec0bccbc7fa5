"""A data set as token files of other programs (see `token_files`): the inverse of reading them.

Both sides are written, every document with its end-of-text id, in the order of the shards; memory does not grow with
the data set.
"""

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.atomic_write import staging, sync
from nanochat_cli.config.sections.data import TokenFormat
from nanochat_cli.data.manifest import SPLITS
from nanochat_cli.data.shards import STAGED, TOKENIZER, Shard, ShardReader
from nanochat_cli.data.token_files import LLMC_HEADER, LLMC_MAGICS, MEGATRON_MAGIC
from nanochat_cli.errors import ConfigError, DataError, reason
from nanochat_cli.folders import held_folder

BLOCK = 1 << 20


def export_tokens(reader: ShardReader, form: TokenFormat, out: Path) -> list[Path]:
    """Write both sides and the tokenizer into the folder `out`, which is new or empty; returns the files of tokens.

    If it fails, nothing of it stays. Raises ConfigError if `out` is not empty or the format cannot hold the ids,
    DataError if it cannot be written, and for conversations.
    """
    if reader.manifest.chat is not None:
        raise DataError(
            f"{reader.folder}: holds conversations; token files cannot say which of their tokens are trained"
        )
    vocab_size = reader.tokenizer.vocab_size
    if form == "nanogpt" and vocab_size > 1 << 16:
        raise ConfigError(f"{reader.folder}: nanoGPT files hold ids of 16 bits, but the tokenizer has {vocab_size}")
    try:
        with held_folder(out, "exports into"):
            if any(not path.name.startswith(".") for path in out.iterdir()):
                raise ConfigError(f"{out}: is not empty; choose another --out")
            with staging(out, STAGED) as staged:
                for split in SPLITS:
                    shards = [Shard(reader.folder / info.file, info) for info in reader.manifest.split(split).shards]
                    _WRITERS[form](staged / split, shards, reader.tokenizer.eos_id, vocab_size)
                (staged / TOKENIZER).write_bytes((reader.folder / TOKENIZER).read_bytes())
                written = sorted(staged.iterdir())
                for path in written:
                    sync(path)
                for path in written:
                    path.rename(out / path.name)
                staged.rmdir()
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot export: {reason(error)}; free space or choose another"
        ) from error
    return [out / path.name for path in written if path.suffix in (".ds", ".bin")]


def _nanotron(name: Path, shards: list[Shard], _: int, vocab_size: int) -> None:
    dtype = shards[0].tokens.dtype
    _write(name.with_suffix(".ds"), _blocks(shards, dtype))
    _write(name.with_suffix(".ds.index"), (ends.astype("<u8") for ends in _ends(shards)))
    tokens = sum(shard.info.tokens for shard in shards)
    metadata = f"{TOKENIZER}|{dtype.itemsize}\n{tokens}\n{tokens / 1e6:.3g} MT"
    name.with_suffix(".ds.metadata").write_text(metadata, encoding="utf-8")


def _megatron(name: Path, shards: list[Shard], _: int, vocab_size: int) -> None:
    """One sequence per document; ids by Megatron's own rule (`DType.optimal_dtype`)."""
    code, dtype = (8, np.dtype("<u2")) if vocab_size < 65500 else (4, np.dtype("<i4"))
    _write(name.with_suffix(".bin"), _blocks(shards, dtype))
    documents = sum(shard.info.documents for shard in shards)

    def index() -> Iterator[bytes | NDArray]:
        yield MEGATRON_MAGIC + struct.pack("<QBQQ", 1, code, documents, documents + 1)
        for shard in shards:
            yield np.diff(shard.doc_offsets).astype("<i4")
        first = 0
        for shard, ends in zip(shards, _ends(shards), strict=True):
            yield ((ends - np.diff(shard.doc_offsets)) * dtype.itemsize).astype("<i8")
        for shard in shards:
            yield np.arange(first, first := first + shard.info.documents, dtype="<i8")
        yield np.array([first], dtype="<i8")

    _write(name.with_suffix(".idx"), index())


def _nanogpt(name: Path, shards: list[Shard], _: int, vocab_size: int) -> None:
    _write(name.with_suffix(".bin"), _blocks(shards, np.dtype("<u2")))


def _llmc(name: Path, shards: list[Shard], eos_id: int, vocab_size: int) -> None:
    """A file for every shard; the end-of-text id comes before each document, as llm.c has it."""
    for number, shard in enumerate(shards):
        magic, version, dtype = next(
            (magic, version, dtype) for magic, (version, dtype) in LLMC_MAGICS.items() if dtype == shard.tokens.dtype
        )
        header = np.zeros(LLMC_HEADER, "<i4")
        header[:3] = magic, version, len(shard.tokens)
        _write(
            name.with_name(f"{name.name}_{number:06d}.bin"),
            (header, np.array([eos_id], dtype), *(_blocks([shard], dtype, leave_out=1))),
        )


_WRITERS = {"nanotron": _nanotron, "megatron": _megatron, "nanogpt": _nanogpt, "llmc": _llmc}


def _blocks(shards: list[Shard], dtype: np.dtype, leave_out: int = 0) -> Iterator[NDArray]:
    """The tokens of the shards, without the last `leave_out` of each."""
    for shard in shards:
        tokens = shard.tokens[: len(shard.tokens) - leave_out]
        for start in range(0, len(tokens), BLOCK):
            yield tokens[start : start + BLOCK].astype(dtype, copy=False)


def _ends(shards: list[Shard]) -> Iterator[NDArray[np.integer]]:
    """The ends of the documents of every shard, counted from the first shard on."""
    start = 0
    for shard in shards:
        yield shard.doc_offsets[1:] + start
        start += shard.info.tokens


def _write(path: Path, parts: Iterable[bytes | NDArray]) -> None:
    with path.open("wb") as out:
        for part in parts:
            out.write(part if isinstance(part, bytes) else part.tobytes())
