"""Token shards on disk: write them, verify them, read them without loading them.

A data set is a folder: `tokenizer.json`, `train-00000.safetensors …`, `val-00000.safetensors …` and `manifest.json`,
which is written last and has the sha256 of everything else: without a manifest there is no data set, so nothing
half-written is ever trusted. A shard holds `tokens` (uint16 up to 65536 ids, else uint32), `doc_offsets`
(int64 [documents + 1]) and, of conversations, `loss_mask` (uint8, 1 where a token is trained).
Knows nothing of where the tokens came from.
"""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.atomic_write import install
from nanochat_cli.data.manifest import MANIFEST, SPLITS, Manifest, ShardInfo, Split, SplitInfo, read_manifest
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError, reason
from nanochat_cli.nesting import parse_json

TOKENIZER = "tokenizer.json"
CARD = "CARD.md"
STAGED = ".preparing"
MAX_SHARD_TOKENS = 64_000_000
FULL_VERIFY_BYTES = 1 << 30  # hashing this much takes about a second; above, only sizes are checked by default
COPY_BYTES = 1 << 20
_DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}


# -- writing ---------------------------------------------------------------------------------------------


class ShardWriter:
    """Appends documents of one split to shards of at most `max_tokens` (a longer document gets its own shard).

    split: train or val, with `-NAME` for one source of a mixture.
    Tokens are streamed to a hidden temporary file; only doc_offsets, and which tokens of conversations are trained, are
    kept in memory. Raises OSError.
    """

    def __init__(self, folder: Path, split: str, vocab_size: int, max_tokens: int = MAX_SHARD_TOKENS) -> None:
        self.folder = folder
        self.split = split
        self.dtype_name = "U16" if vocab_size <= 1 << 16 else "U32"
        self.max_tokens = max_tokens
        self.shards: list[ShardInfo] = []
        self._offsets = [0]
        self._bytes = self._largest = 0
        self._trained: list[NDArray[np.uint8]] = []
        self._tokens_path = folder / f".{split}-tokens.partial"
        self._tokens: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._tokens is not None:
            self._tokens.close()
            self._tokens = None
        self._tokens_path.unlink(missing_ok=True)

    def add(self, tokens: NDArray[np.integer], n_bytes: int, trained: NDArray[np.bool_] | None = None) -> None:
        """Append one document: its token ids (EOS included) and the bytes of text they stand for.

        trained: bool, as many, of a conversation; all documents have it or none.
        """
        if self._offsets[-1] and self._offsets[-1] + len(tokens) > self.max_tokens:
            self._finish_shard()
        if self._tokens is None:
            self._tokens = self._tokens_path.open("wb")
        self._tokens.write(tokens.astype(_DTYPES[self.dtype_name], copy=False).tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        if trained is not None:
            self._trained.append(trained.astype(np.uint8))
        self._bytes += n_bytes
        self._largest = max(self._largest, int(tokens.max(initial=0)))

    def finish(self) -> SplitInfo:
        """Close the last shard and return what was written."""
        if len(self._offsets) > 1:
            self._finish_shard()
        return SplitInfo(
            tokens=sum(shard.tokens for shard in self.shards),
            documents=sum(shard.documents for shard in self.shards),
            bytes=sum(shard.bytes for shard in self.shards),
            shards=self.shards,
        )

    def _finish_shard(self) -> None:
        if self._tokens is None:
            raise RuntimeError("a shard without documents cannot be finished")
        self._tokens.close()
        self._tokens = None
        offsets = np.array(self._offsets, dtype=_DTYPES["I64"]).tobytes()
        n_tokens = self._offsets[-1]
        path = self.folder / f"{self.split}-{len(self.shards):05d}.safetensors"
        temporary = path.with_name(f".{path.name}.partial")
        # doc_offsets first: safetensors wants the widest type first, so that every tensor is aligned.
        tensors = [("doc_offsets", "I64", len(self._offsets)), ("tokens", self.dtype_name, n_tokens)]
        mask = b"".join(part.tobytes() for part in self._trained)
        header = _safetensors_header([*tensors, ("loss_mask", "U8", n_tokens)] if mask else tensors)
        digest = hashlib.sha256()
        with temporary.open("wb") as out, self._tokens_path.open("rb") as tokens:
            for block in chain((header, offsets), iter(lambda: tokens.read(COPY_BYTES), b""), (mask,)):
                digest.update(block)
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        temporary.rename(path)
        self.shards.append(
            ShardInfo(
                file=path.name,
                sha256=digest.hexdigest(),
                size=size,
                tokens=n_tokens,
                documents=len(self._offsets) - 1,
                bytes=self._bytes,
                largest=self._largest,
            )
        )
        self._offsets = [0]
        self._trained = []
        self._bytes = self._largest = 0


def _safetensors_header(tensors: list[tuple[str, str, int]]) -> bytes:
    """Length and JSON header of a safetensors file of 1-D tensors (name, dtype name, elements)."""
    entries: dict[str, dict[str, object]] = {}
    start = 0
    for name, dtype, count in tensors:
        end = start + count * _DTYPES[dtype].itemsize
        entries[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# -- reading ---------------------------------------------------------------------------------------------


class Shard:
    """One memory-mapped shard: `tokens` [n], `doc_offsets` [documents + 1], `loss_mask` [n] or None."""

    def __init__(self, path: Path, info: ShardInfo) -> None:
        self.info = info
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > info.size:
                    raise ValueError("its header is longer than the file")
                header = parse_json(file.read(length))
            self.tokens = _map(path, header["tokens"], 8 + length)
            self.doc_offsets = _map(path, header["doc_offsets"], 8 + length)
            self.loss_mask = _map(path, header["loss_mask"], 8 + length) if "loss_mask" in header else None
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f"{path}: not a token shard ({reason(error)}); run `nanochat tokenize` again") from error
        if len(self.tokens) != info.tokens or len(self.doc_offsets) != info.documents + 1:
            raise DataError(f"{path}: its counts differ from {MANIFEST}; run `nanochat tokenize` again")
        offsets = self.doc_offsets
        if offsets[0] != 0 or offsets[-1] != len(self.tokens) or (np.diff(offsets) < 1).any():
            raise DataError(f"{path}: its documents overlap or have gaps; run `nanochat tokenize` again")

    def require_vocabulary(self, size: int, path: Path, *, read: bool) -> None:
        """Raise DataError for a token outside a vocabulary of `size`: it would index past the embeddings.

        read: look at every token, instead of believing the manifest where it knows the largest.
        """
        known = None if read else self.info.largest
        if (largest := int(self.tokens.max(initial=0)) if known is None else known) >= size:
            raise DataError(f"{path}: token {largest} in a vocabulary of {size}; run `nanochat tokenize` again")


def _map(path: Path, entry: dict, data_start: int) -> NDArray[np.integer]:
    start, end = entry["data_offsets"]
    dtype = _DTYPES[entry["dtype"]]
    return np.memmap(path, dtype=dtype, mode="r", offset=data_start + start, shape=((end - start) // dtype.itemsize,))


class TokenStream:
    """The tokens of one split as one sequence, read from the memory map on demand.

    `stream[a:b]` is int64 [b − a], also across shards; `len(stream)` tokens; `document_count`, `byte_count`.
    """

    def __init__(self, shards: list[Shard], eos_id: int) -> None:
        self._shards = shards
        self._starts = [0]
        for shard in shards:
            self._starts.append(self._starts[-1] + len(shard.tokens))
        self.eos_id = eos_id
        self.document_count = sum(shard.info.documents for shard in shards)
        self.byte_count = sum(shard.info.bytes for shard in shards)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, where: slice) -> NDArray[np.int64]:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError("a token stream is read with step 1")
        out = np.empty(max(stop - start, 0), dtype=np.int64)
        index = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            offset = start + done - self._starts[index]
            part = self._shards[index].tokens[offset : offset + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            index += 1
        return out

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """The token ids of each document, without its EOS."""
        for shard in self._shards:
            for start, stop in zip(shard.doc_offsets[:-1], shard.doc_offsets[1:], strict=True):
                yield shard.tokens[start : stop - 1].astype(np.int64)


class ShardReader:
    """A prepared data set. Opening it checks every file's size and, up to 1 GiB (`verify="auto"`), its sha256.

    Raises DataError if a shard is missing, cut short or changed, or if `vocab_size` is given and differs.
    """

    def __init__(
        self, folder: Path, verify: Literal["auto", "full", "size"] = "auto", vocab_size: int | None = None
    ) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if vocab_size is not None and self.manifest.tokenizer.vocab_size != vocab_size:
            raise DataError(
                f"{folder}: tokenised with {self.manifest.tokenizer.vocab_size} tokens but model.vocab_size = "
                f"{vocab_size}; run `nanochat tokenize` again or set model.vocab_size"
            )
        verify_files(self.folder, self.manifest, verify)
        self.tokenizer = Tokenizer.load(self.folder / TOKENIZER)
        if self.tokenizer.vocab_size != self.manifest.tokenizer.vocab_size:
            raise DataError(
                f"{self.folder / TOKENIZER}: {self.tokenizer.vocab_size} tokens, {MANIFEST} says "
                f"{self.manifest.tokenizer.vocab_size}; run `nanochat tokenize` again"
            )
        self._verify = verify
        self._streams: dict[Split, TokenStream] = {}
        self._shards: dict[Split, list[Shard]] = {}

    def tokens(self, split: Split) -> TokenStream:
        if split not in self._streams:
            shards = [Shard(self.folder / info.file, info) for info in self.manifest.split(split).shards]
            for shard in shards:
                read = self._verify == "full" or (self._verify == "auto" and shard.info.size <= FULL_VERIFY_BYTES)
                shard.require_vocabulary(self.tokenizer.vocab_size, self.folder / shard.info.file, read=read)
            self._shards[split] = shards
            self._streams[split] = TokenStream(shards, self.tokenizer.eos_id)
        return self._streams[split]

    def shards(self, split: Split) -> list[Shard]:
        """Those of a split, verified."""
        self.tokens(split)
        return self._shards[split]

    def documents(self, split: Split) -> Iterator[bytes]:
        """The documents of a split, decoded: exactly the bytes that were encoded."""
        for ids in self.tokens(split).documents():
            yield self.tokenizer.decode_bytes(ids.tolist())


def training_shards(folder: Path) -> list[Shard]:
    """The shards of the training side, of a data set whose files a `ShardReader` has verified."""
    return [Shard(folder / info.file, info) for info in read_manifest(folder).train.shards]


def verify_files(folder: Path, manifest: Manifest, verify: Literal["auto", "full", "size"] = "auto") -> None:
    """Check the files of a data set against its manifest. Raises DataError naming the first that differs."""
    shards = [shard for split in SPLITS for shard in manifest.split(split).shards]
    for shard in shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: missing shard; run `nanochat tokenize` again") from error
        if size != shard.size:
            raise DataError(f"{path}: {size} bytes, {MANIFEST} says {shard.size}; run `nanochat tokenize` again")
    hashes = {TOKENIZER: manifest.tokenizer.sha256}
    if verify == "full" or (verify == "auto" and sum(shard.size for shard in shards) <= FULL_VERIFY_BYTES):
        hashes |= {shard.file: shard.sha256 for shard in shards}
    for name, expected in hashes.items():
        path = folder / name
        try:
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}; run `nanochat tokenize` again") from error
        if actual != expected:
            raise DataError(f"{path}: its sha256 differs from {MANIFEST}; run `nanochat tokenize` again")


# -- replacing -------------------------------------------------------------------------------------------


def install_staged(folder: Path) -> None:
    """Replace the data set in `folder` by the staged one, if there is a complete one.

    If it is killed in between, the folder has no manifest, and the next call finishes the work. Raises OSError.
    """
    staged = folder / STAGED
    if not (staged / MANIFEST).exists():
        return
    manifest = read_manifest(staged)
    names = {TOKENIZER, CARD, *(shard.file for split in SPLITS for shard in manifest.split(split).shards)}
    patterns = "train-*.safetensors", "val-*.safetensors", "text-*.npy", ".*.partial"
    stale = (path for pattern in patterns for path in folder.glob(pattern) if path.name not in names)
    install(staged, folder, names, MANIFEST, stale)
