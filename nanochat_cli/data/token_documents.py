"""Documents of token files: their ids, checked against the tokenizer that reads them, and the text that they stand for.

A document ends where the file's index says, and at every end-of-text id. Knows tokens and text; knows nothing of where
files lie, of splits or of shards.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.config.sections.data import TokenFormat
from nanochat_cli.data.documents import Document, Skipped
from nanochat_cli.data.text_files import MAX_DOCUMENT
from nanochat_cli.data.token_files import open_token_file
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError

# A longer document is cut. No text file makes a longer one (see `text_files`), so what was text comes back whole.
LONGEST = 2 * MAX_DOCUMENT + 4
BLOCK = 1 << 20


class TokenSettings(NamedTuple):
    """`format` of the files; `eot_id` between documents, None: the tokenizer's; path of the `tokenizer` they need."""

    format: Literal["auto", TokenFormat] = "auto"
    eot_id: int | None = None
    tokenizer: Path | None = None


def token_documents(
    path: Path, name: str, settings: TokenSettings, tokenizer: Tokenizer
) -> Iterator[Document | Skipped]:
    """The documents of a file, in order; long ones in pieces, empty ones as Skipped.

    Raises DataError if the file is damaged, if an id is not in the tokenizer, or if nothing in it tells where documents
    end.
    """
    assert settings.format != "auto", "the format is known before a file is read"
    file = open_token_file(path, settings.format)
    eot = tokenizer.eos_id if settings.eot_id is None else settings.eot_id
    sizes = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    number = start = 0
    for end in (len(file.ids),) if file.ends is None else file.ends():
        ids = file.ids[start:end]
        start, some = end, False
        for first, last in _between(ids, eot):
            if file.ends is None and last - first == len(ids):
                raise DataError(f"{path}: no id {eot} ends a document in it; {_how_to_choose(tokenizer)}")
            some = True
            if first == last:
                yield Skipped(f"{name}#{number}", "empty")
            for piece in _pieces(ids[first:last], sizes, path, settings.format):
                yield Document(f"{name}#{number}", tokenizer.decode_bytes(piece.tolist()), tokens=piece)
            number += 1
        if not some and file.ends is not None:
            yield Skipped(f"{name}#{number}", "empty")
            number += 1


def _how_to_choose(tokenizer: Tokenizer) -> str:
    special = ", ".join(f"{text} = {token}" for text, token in tokenizer.special_tokens.items())
    return f"give the one that does with --eot-id (data.eot_id); the tokenizer's special tokens: {special}"


def _between(ids: NDArray[np.unsignedinteger], eot: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of what lies between end-of-text ids; not the nothing before the first one or after the last one.

    So it does not matter whether a program writes the id before each document (llm.c) or after it (nanoGPT).
    """
    start = 0
    for block in range(0, len(ids), BLOCK):
        for stop in (block + np.flatnonzero(ids[block : block + BLOCK] == eot)).tolist():
            if stop:
                yield start, stop
            start = stop + 1
    if start < len(ids):
        yield start, len(ids)


def _pieces(
    ids: NDArray[np.unsignedinteger], sizes: NDArray[np.int64], path: Path, form: str
) -> Iterator[NDArray[np.uint32]]:
    """The ids, in parts that decode to at most LONGEST bytes; sizes: bytes of every token."""
    start = 0
    while start < len(ids):
        piece = ids[start : start + LONGEST].astype(np.uint32)  # a token has at least a byte
        if (largest := int(piece.max())) >= len(sizes):
            raise DataError(
                f"{path}: id {largest} is not in the tokenizer, which has {len(sizes)}: give the tokenizer that made "
                f"the file, or its format if it is not {form}"
            )
        piece = piece[: max(1, int(np.searchsorted(sizes[piece].cumsum(), LONGEST, side="right")))]
        yield piece
        start += len(piece)
