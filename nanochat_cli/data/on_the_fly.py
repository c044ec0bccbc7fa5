"""Batches tokenised while training: text is read at random places of the source, encoded, and cut into rows.

The training documents, one after the other, form one text of N bytes. It is cut into windows of as many bytes as the
tokens of a row take on average; every epoch visits each window once, in the order in which `data.batches` visits
windows of tokens, and shifts the edges of all windows by its own distance. A row begins at the first blank after the
edge, and takes the tokens from there on, EOS after every document, until it is full: all of it is a function of
(seed, index). Knows text and tokens; knows nothing of processes or torch.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nanochat_cli.data.batches import Batch, permuted
from nanochat_cli.data.records import BadRecord, parsed, text_of
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError

COLUMNS = 7
FILE, OFFSET, SIZE, IS_RECORD, START, LENGTH, END = range(COLUMNS)
# A row that begins inside a document begins at a blank, if there is one within this many bytes.
BLANK_WITHIN = 64
# Text read for a row, relative to what rows need on average; a row that lacks tokens reads twice as much.
READ_AHEAD = 1.25
# Tokens this close to where a document was cut may differ from those of the whole document.
DOUBTFUL = 16


class TextStore:
    """The training documents as one text. index: a file of `data.text_index`; files: those that it refers to."""

    def __init__(self, index: Path, files: tuple[Path, ...], text_field: str) -> None:
        self.documents: NDArray[np.int64] = np.load(index, mmap_mode="r")
        self.files = files
        self.text_field = text_field

    def __len__(self) -> int:
        return int(self.documents[-1, END])

    def stretch(self, start: int, n_bytes: int) -> tuple[list[bytes], bool]:
        """`n_bytes` from `start` on, by document, wrapping around, and whether the last document ends there.

        If the first document is cut, its piece begins at a blank or at least at a character.
        """
        number = int(np.searchsorted(self.documents[:, END], start, side="right"))
        skip = start - int(self.documents[number, END] - self.documents[number, LENGTH])
        pieces: list[bytes] = []
        left, whole = n_bytes, True
        while left > 0:
            length = int(self.documents[number, LENGTH])
            taken = min(length - skip, left)
            piece = self._read(number, skip, taken)
            pieces.append(_from_a_blank(piece) if skip else piece)
            left -= taken
            whole = skip + taken == length
            number, skip = (number + 1) % len(self.documents), 0
        return pieces, whole

    def _read(self, number: int, skip: int, n_bytes: int) -> bytes:
        file, offset, size, is_record, start, _, _ = self.documents[number].tolist()
        path = self.files[file]
        if not is_record:
            return _read_bytes(path, offset + skip, n_bytes)
        try:
            text = text_of(parsed(_read_bytes(path, offset, size)), self.text_field)
        except BadRecord as bad:
            raise DataError(f"{path}, byte {offset}: {bad}; run `nanochat tokenize` again") from bad
        return text[start + skip : start + skip + n_bytes]


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            content = file.read(size)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    if len(content) != size:
        raise DataError(f"{path}: is shorter than when it was prepared; run `nanochat tokenize` again")
    return content


def _from_a_blank(piece: bytes) -> bytes:
    for place, byte in enumerate(piece[:BLANK_WITHIN]):
        if byte in b" \n\t":
            return piece[place:]
    first = 0
    while first < len(piece) and piece[first] & 0xC0 == 0x80:  # the rest of a character
        first += 1
    return piece[first:]


class TextBatches:
    """Training batches of `store`, encoded by `tokenizer`; bytes_per_token: the data set's mean sizes the windows.

    shift, stride: see `data.batches`.
    """

    def __init__(
        self,
        store: TextStore,
        tokenizer: Tokenizer,
        batch_size: int,
        seq_len: int,
        seed: int,
        bytes_per_token: float,
        shift: int = 0,
        stride: int | None = None,
    ) -> None:
        self.store = store
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.seed = seed
        self.shift = shift
        self.stride = batch_size if stride is None else stride
        self.window_bytes = max(1, round(seq_len * bytes_per_token))
        self.windows = max(1, len(store) // self.window_bytes)

    def batch(self, index: int) -> Batch:
        """Batch `index` ≥ 0: (inputs, targets), int64 [batch_size, seq_len]; targets are inputs shifted by one."""
        rows = np.empty((self.batch_size, self.seq_len + 1), dtype=np.int64)
        first = index * self.stride + self.shift
        starts = dict(enumerate(self.start(first + row) for row in range(self.batch_size)))
        n_bytes = round(self.window_bytes * READ_AHEAD) + BLANK_WITHIN
        while starts:
            for row, tokens in self._encoded(starts, n_bytes).items():
                if tokens is not None:
                    rows[row] = tokens
                    del starts[row]
            n_bytes *= 2
        return rows[:, :-1].copy(), rows[:, 1:].copy()

    def start(self, place: int) -> int:
        """The byte at which the window at a place of the endless order begins."""
        epoch, within = divmod(place, self.windows)
        moved = permuted(0, self.window_bytes, self.seed, epoch)
        return (permuted(within, self.windows, self.seed, epoch) * self.window_bytes + moved) % len(self.store)

    def _encoded(self, starts: dict[int, int], n_bytes: int) -> dict[int, list[int] | None]:
        """seq_len + 1 tokens of each row from `n_bytes` of text, or None if there are too few."""
        stretches = {row: self.store.stretch(start, n_bytes) for row, start in starts.items()}
        # Text is valid UTF-8, so only a character at the cut is left out.
        texts = [piece.decode("utf-8", "ignore") for pieces, _ in stretches.values() for piece in pieces]
        encoded = iter(self.tokenizer.encode_batch(texts))
        rows: dict[int, list[int] | None] = {}
        for row, (pieces, whole) in stretches.items():
            tokens: list[int] = []
            for number in range(len(pieces)):
                tokens += next(encoded)
                if whole or number < len(pieces) - 1:
                    tokens.append(self.tokenizer.eos_id)
            enough = len(tokens) - (0 if whole else DOUBTFUL) > self.seq_len
            rows[row] = tokens[: self.seq_len + 1] if enough else None
        return rows
