"""Corpora: a source named on the command line becomes a re-iterable stream of documents.

Knows where text comes from (files, folders, records, `datasets`, tokens of others) and records what is left out;
`text_files` and `records` decide which text is usable. Memory is bounded by one document. Knows nothing of splits or
shards.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nanochat_cli.data.documents import Document, LongLines, Skipped, printable
from nanochat_cli.data.hub import load_rows
from nanochat_cli.data.records import BadRecord, holds_records, in_pieces, kind_of, record_documents, text_of
from nanochat_cli.data.source_files import made_by, walk
from nanochat_cli.data.text_files import MAX_DOCUMENT, text_documents
from nanochat_cli.data.token_documents import TokenSettings, token_documents
from nanochat_cli.data.token_files import companions, token_files
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError

# A source that is one text file is cut into smaller pieces, so that part of it can be held out.
SINGLE_FILE_PIECE = 16 * 1024
NAMED = 10
"""Most names that are kept of what was left out, and of files with long lines."""


@dataclass
class Corpus:
    """Documents in a fixed order, read afresh by every iteration.

    `skipped` counts by reason what the last iteration left out, `left_out` has the first of each reason and the first
    NAMED of all; `long_lines` are files that look minified or generated but were used. `size_bytes` is the size of all
    files, if known; `files` are those that the places of documents refer to. tokens: of what format, and with which id
    between documents, if they were tokenised by others.
    """

    source: str
    fingerprint: str
    size_bytes: int | None
    read: Callable[[], Iterator[Document | Skipped | LongLines]]
    files: tuple[Path, ...] = ()
    tokens: TokenSettings | None = None
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: list[Skipped] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Document]:
        """Usable documents. Raises DataError if there are none, or if the source cannot be read."""
        for kept in (self.skipped, self.left_out, self.long_lines):
            kept.clear()
        usable = 0
        for item in self.read():
            if isinstance(item, Document):
                usable += 1
                yield item
            elif isinstance(item, LongLines):
                self.long_lines.append(item.id)
            else:
                if len(self.left_out) < NAMED or item.reason not in self.skipped:
                    self.left_out.append(item)
                self.skipped[item.reason] += 1
        if not usable:
            detail = next((f"; {item.id}: {item.detail}" for item in self.left_out if item.detail), "")
            why = f" ({self._reasons()}{detail})" if self.skipped else ": it is empty"
            raise DataError(printable(f"{self.source}: no usable document{why}"))

    def what_was_left_out(self) -> str:
        """The count of each reason, and the first names."""
        more = sum(self.skipped.values()) - len(self.left_out)
        names = ", ".join(f"{item.id} ({item.reason})" for item in self.left_out)
        return f"{self._reasons()}: {names}" + (f" and {more} more" if more else "")

    def _reasons(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))


def open_corpus(
    source: str,
    glob: str = "**/*",
    text_field: str = "text",
    streaming: bool = False,
    output: Path | None = None,
    tokens: TokenSettings = TokenSettings(),
) -> Corpus:
    """The corpus that `source` names: `stdlib`, `hf:NAME[@CONFIG][:SPLIT]`, a folder, a file, .jsonl or .parquet.

    `glob` selects files of a folder: without a slash it is matched against the file name at any depth. Files of records
    are recognised by their suffix (see `records`). Hidden files and folders, links to folders, the output of programs
    (see `source_files`) and `output`, the folder to be written, are left out.
    `text_field` is the column of records. `streaming` reads an `hf:` source without storing it first. `tokens` is for
    files of token ids (see `token_files`).
    Raises DataError if the source does not exist, no file matches, or it is already a data set; ConfigError if it is
    `output` itself, or if `tokens` does not fit it.
    """
    if source == "stdlib" or source.startswith("hf:"):
        _require_text(source, tokens)
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        files = list(walk(root, "*.py", leave_out=("site-packages", "dist-packages")))
        # The interpreter's version and the sizes identify it; mtimes only tell when it was installed.
        return _file_corpus(source, root, files, text_field, [sys.version], mtimes=False)
    if source.startswith("hf:"):
        return _hub_corpus(source, text_field, streaming)
    path = Path(source)
    if path.is_dir():
        _require_corpus(path, output)
        files = list(walk(path, glob, output=output))
        if not files:
            raise DataError(f"{source}: no file matches glob '{glob}'; set data.glob (--glob)")
        if (corpus := _token_corpus(source, path, files, tokens)) is not None:
            return corpus
        return _file_corpus(source, path, files, text_field, [glob])
    if not path.exists():
        raise DataError(
            f"{source}: no such file or folder (a source is 'stdlib', a file, a folder, or hf:NAME[@CONFIG][:SPLIT])"
        )
    if (corpus := _token_corpus(source, path.parent, [path], tokens)) is not None:
        return corpus
    return _file_corpus(source, path.parent, [path], text_field, [], piece=SINGLE_FILE_PIECE)


def _require_corpus(folder: Path, output: Path | None) -> None:
    if output is not None and output.resolve() == folder.resolve():
        raise ConfigError(f"{folder}: is both the source and the folder to be written; choose another --out")
    if made_by(folder, [path.name for path in folder.iterdir()], []) == "a data set":
        raise DataError(f"{folder}: is a data set of nanochat tokenize, not a corpus; train on it with data.path")


# -- files -----------------------------------------------------------------------------------------------


def _file_corpus(
    source: str,
    root: Path,
    files: list[Path],
    text_field: str,
    identity: list[str],
    *,
    mtimes: bool = True,
    piece: int = MAX_DOCUMENT,
) -> Corpus:
    fingerprint, total = _identified(root, files, identity, mtimes)

    def read() -> Iterator[Document | Skipped | LongLines]:
        for path in files:
            name = str(path.relative_to(root))
            try:
                kind = kind_of(path)
                if kind is None:
                    yield from text_documents(path, name, piece)
                else:
                    yield from record_documents(path, name, kind, text_field)
            except OSError as error:
                raise DataError(printable(f"{path}: cannot read: {error.strerror or error}")) from error

    size = None if any(map(holds_records, files)) else total
    return Corpus(source, fingerprint, size, read, tuple(files))


def _identified(root: Path, files: list[Path], identity: list[str], mtimes: bool = True) -> tuple[str, int]:
    """A fingerprint of names, sizes and times, and the size of all files."""
    digest, total = hashlib.sha256(json.dumps(identity).encode()), 0
    for path in files:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot read: {error.strerror}") from error
        total += status.st_size
        name = os.fsencode(path.relative_to(root))
        digest.update(b"%s\0%d\0%d\0" % (name, status.st_size, status.st_mtime_ns if mtimes else 0))
    return digest.hexdigest(), total


# -- tokens of others ------------------------------------------------------------------------------------


def _token_corpus(source: str, root: Path, found: list[Path], tokens: TokenSettings) -> Corpus | None:
    """The corpus of token files, or None if they are text. Raises ConfigError if there is no tokenizer to read them."""
    form, files = token_files(found, tokens.format, folder=Path(source).is_dir())
    path = tokens.tokenizer
    if form is None:
        _require_text(source, tokens)
        return None
    if path is None:
        raise ConfigError(
            f"{source}: holds token ids ({form}); name the tokenizer.json that made them with --tokenizer "
            "(tokenizer.path)"
        )
    settings, tokenizer = tokens._replace(format=form), cache(Tokenizer.load)

    def read() -> Iterator[Document | Skipped]:
        for file in files:
            yield from token_documents(file, str(file.relative_to(root)), settings, tokenizer(path))

    everything = [part for file in files for part in (file, *companions(file, form))]
    return Corpus(source, _identified(root, everything, [form])[0], None, read, tokens=settings)


def _require_text(source: str, tokens: TokenSettings) -> None:
    if tokens.format != "auto" or tokens.eot_id is not None:
        raise ConfigError(f"{source}: is text; data.format and data.eot_id are for files of token ids")


# -- hf: -------------------------------------------------------------------------------------------------


def _hub_corpus(source: str, text_field: str, streaming: bool) -> Corpus:
    """A data set through `datasets.load_dataset`. `NAME` may be a local folder of data files.

    A hub data set is identified by its name, so a new revision goes unnoticed; a local folder by its files.
    """
    name, config, split = _parse_hub_name(source)
    identity = ["hf", name, config or "", split, text_field]
    if Path(name).is_dir():
        identity.append(_file_corpus(source, Path(name), list(walk(Path(name), "*")), text_field, []).fingerprint)

    def read() -> Iterator[Document | Skipped]:
        from datasets.exceptions import DatasetsError

        hint = "give a folder or a file that holds its text"
        rows = load_rows(source, hint, name, config, split=split, streaming=streaming)
        try:
            yield from in_pieces(_row(f"{split}:{number}", row, text_field) for number, row in enumerate(rows))
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{source}: cannot load: {' '.join(str(error).split())}") from error

    digest = hashlib.sha256(json.dumps(identity).encode())
    return Corpus(source, digest.hexdigest(), None, read)


def _row(name: str, row: object, text_field: str) -> Document | Skipped:
    try:
        return Document(name, text_of(row, text_field))
    except BadRecord as bad:
        return Skipped(name, bad.reason, bad.detail)


def _parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """`hf:NAME[@CONFIG][:SPLIT]` -> (name, config or None, split; default train)."""
    rest = source.removeprefix("hf:")
    if rest and Path(rest).is_dir():
        return rest, None, "train"
    name, _, split = rest.partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise DataError(f"{source}: no data set named; write hf:NAME[@CONFIG][:SPLIT]")
    return name, config or None, split or "train"
