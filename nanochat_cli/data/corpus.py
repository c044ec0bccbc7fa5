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
from functools import cache, partial
from pathlib import Path

from nanochat_cli.config.source_parts import Part
from nanochat_cli.data.archives import archive_compression, archive_documents
from nanochat_cli.data.documents import Document, LongLines, Skipped, printable
from nanochat_cli.data.filters import Filters
from nanochat_cli.data.functions import functions_of
from nanochat_cli.data.hub import load_rows
from nanochat_cli.data.origin import language_of
from nanochat_cli.data.records import (
    RECORDS,
    BadRecord,
    compression_of,
    in_pieces,
    kind_of,
    opened,
    record_documents,
    text_of,
)
from nanochat_cli.data.secrets import masked
from nanochat_cli.data.source_files import Found, made_by, walk
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
    NAMED of all; `long_lines` are files that look minified or generated but were used; `secrets` counts them by
    kind, `with_secrets` has documents that hold some. `size_bytes` is the size of all files, if known; `files` are
    those that the places of documents refer to, `licences` those that hold a licence; `ignored` counts what git
    ignores. `parts`: its sources, if it is a mixture. tokens: of what format, and with which id between documents, if
    they were tokenised by others. forms: of the conversations that the last iteration read, if they are some.
    """

    source: str
    fingerprint: str
    size_bytes: int | None
    read: Callable[[], Iterator[Document | Skipped | LongLines]]
    files: tuple[Path, ...] = ()
    tokens: TokenSettings | None = None
    filters: Filters = field(default_factory=Filters)
    licences: tuple[Path, ...] = ()
    ignored: int = 0
    parts: tuple[Part, ...] = ()
    secrets: Counter[str] = field(default_factory=Counter)
    with_secrets: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: list[Skipped] = field(default_factory=list)
    long_lines: list[str] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[Document]:
        """Usable documents. Raises DataError if there are none, or if the source cannot be read."""
        for kept in (self.skipped, self.left_out, self.long_lines, self.secrets, self.with_secrets):
            kept.clear()
        self.skipped += Counter({"ignored by .gitignore": self.ignored})
        usable = 0
        for item in self.read():
            if isinstance(item, Document):
                for document in self._parts_of(self._without_secrets(item)):
                    usable += 1
                    yield document
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

    def _without_secrets(self, document: Document) -> Document:
        if self.filters.secrets == "off":
            return document
        content = masked(document.content, self.secrets)
        if content == document.content:
            return document
        if len(self.with_secrets) < NAMED:
            self.with_secrets.append(document.id)
        return document._replace(content=content, place=None) if self.filters.secrets == "mask" else document

    def _parts_of(self, document: Document) -> Iterator[Document]:
        """The document, or its functions if only those are taken."""
        if not self.filters.functions:
            yield document
            return
        language = language_of(document.id)
        text = document.content.decode("utf-8", "ignore")  # a piece of a long file may be cut inside a character
        number = 0
        for number, function in enumerate(functions_of(language, text), 1):
            yield Document(f"{document.id}@{number}", function.document.encode(), part=document.part)
        if not number:
            self.skipped["no free function of Python or Rust"] += 1

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
    filters: Filters = Filters(),
) -> Corpus:
    """The corpus that `source` names: `stdlib`, `hf:NAME[@CONFIG][:SPLIT]`, a folder, a file, .jsonl or .parquet.

    `glob` selects files of a folder: without a slash it is matched against the file name at any depth. Files of records
    are recognised by their suffix (see `records`). Hidden files and folders, links to folders, the output of programs
    (see `source_files`) and `output`, the folder to be written, are left out.
    `text_field` is the column of records. `streaming` reads an `hf:` source without storing it first. `tokens` is for
    files of token ids (see `token_files`). `filters` leave out more.
    Raises DataError if the source does not exist, no file matches, or it is already a data set; ConfigError if it is
    `output` itself, or if `tokens` does not fit it.
    """
    if source == "stdlib" or source.startswith("hf:"):
        _require_text(source, tokens)
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = walk(root, "*.py", leave_out=("site-packages", "dist-packages"))
        # The interpreter's version and the sizes identify it; mtimes only tell when it was installed.
        return _file_corpus(source, root, found, text_field, filters, [sys.version], mtimes=False)
    if source.startswith("hf:"):
        return _hub_corpus(source, text_field, filters, streaming)
    path = Path(source)
    if path.is_dir():
        _require_corpus(path, output)
        found = walk(path, glob, output=output, gitignore=filters.gitignore)
        if not found.files:
            ignored = f" that git does not ignore (data.gitignore=false takes {found.ignored})" if found.ignored else ""
            raise DataError(f"{source}: no file matches glob '{glob}'{ignored}; set data.glob (--glob)")
        if (corpus := _token_corpus(source, path, found.files, tokens, filters)) is not None:
            return corpus
        return _file_corpus(source, path, found, text_field, filters, [glob])
    if not path.exists():
        raise DataError(
            f"{source}: no such file or folder (a source is 'stdlib', a file, a folder, or hf:NAME[@CONFIG][:SPLIT])"
        )
    if (corpus := _token_corpus(source, path.parent, [path], tokens, filters)) is not None:
        return corpus
    is_archive = archive_compression(path) is not None
    return _file_corpus(
        source,
        path.parent,
        Found([path], 0, []),
        text_field,
        filters,
        [glob] if is_archive else [],
        piece=SINGLE_FILE_PIECE,
        inside=glob,
    )


def _require_corpus(folder: Path, output: Path | None) -> None:
    if output is not None and output.resolve() == folder.resolve():
        raise ConfigError(f"{folder}: is both the source and the folder to be written; choose another --out")
    if made_by(folder, [path.name for path in folder.iterdir()], []) == "a data set":
        raise DataError(f"{folder}: is a data set of nanochat tokenize, not a corpus; train on it with data.path")


# -- files -----------------------------------------------------------------------------------------------


def _file_corpus(
    source: str,
    root: Path,
    found: Found,
    text_field: str,
    filters: Filters,
    identity: list[str],
    *,
    mtimes: bool = True,
    piece: int = MAX_DOCUMENT,
    inside: str = "**",
) -> Corpus:
    """inside: which files of an archive are taken."""
    files = found.files
    fingerprint, total = identified(root, files, identity, mtimes)

    def read() -> Iterator[Document | Skipped | LongLines]:
        for path in files:
            name = str(path.relative_to(root))
            try:
                yield from _documents(path, name, text_field, filters, piece, inside)
            except OSError as error:
                raise DataError(printable(f"{path}: cannot read: {error.strerror or error}")) from error

    size = total if all(map(_is_plain, files)) else None
    licences = tuple(found.licences)
    return Corpus(
        source, fingerprint, size, read, tuple(files), filters=filters, licences=licences, ignored=found.ignored
    )


def _documents(
    path: Path, name: str, text_field: str, filters: Filters, piece: int, inside: str
) -> Iterator[Document | Skipped | LongLines]:
    """The documents of a file: records, a text, or an archive of texts."""
    archive, compression = archive_compression(path), compression_of(path.name.lower())
    if archive is not None:
        yield from archive_documents(path, name, archive, inside, filters)
    elif (kind := kind_of(path)) is not None:
        yield from record_documents(path, name, kind, text_field, filters)
    elif not compression:
        yield from text_documents(partial(path.open, "rb"), name, piece, filters, path)
    else:
        try:
            yield from text_documents(partial(opened, path, compression), name[: -len(compression)], piece, filters)
        except DataError as error:
            yield Skipped(name, "damaged", str(error))


def _is_plain(path: Path) -> bool:
    """Whether the size of a file is that of its text."""
    name = path.name.lower()
    return not (name.endswith(RECORDS) or compression_of(name) or archive_compression(path) is not None)


def identified(root: Path, files: list[Path], identity: list[str], mtimes: bool = True) -> tuple[str, int]:
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


def _token_corpus(source: str, root: Path, found: list[Path], tokens: TokenSettings, filters: Filters) -> Corpus | None:
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
    if filters.secrets == "mask" or filters.functions:
        key = "data.functions" if filters.functions else "data.secrets=mask"
        raise ConfigError(f"{source}: holds token ids; {key} is for text")
    settings, tokenizer = tokens._replace(format=form), cache(Tokenizer.load)

    def read() -> Iterator[Document | Skipped]:
        for file in files:
            yield from token_documents(file, str(file.relative_to(root)), settings, tokenizer(path))

    everything = [part for file in files for part in (file, *companions(file, form))]
    return Corpus(source, identified(root, everything, [form])[0], None, read, tokens=settings, filters=filters)


def _require_text(source: str, tokens: TokenSettings) -> None:
    if tokens.format != "auto" or tokens.eot_id is not None:
        raise ConfigError(f"{source}: is text; data.format and data.eot_id are for files of token ids")


# -- hf: -------------------------------------------------------------------------------------------------


def _hub_corpus(source: str, text_field: str, filters: Filters, streaming: bool) -> Corpus:
    """A data set through `datasets.load_dataset`. `NAME` may be a local folder of data files.

    A hub data set is identified by its name, so a new revision goes unnoticed; a local folder by its files.
    """
    name, config, split = parse_hub_name(source)
    identity = ["hf", name, config or "", split, text_field]
    if Path(name).is_dir():
        identity.append(identified(Path(name), walk(Path(name), "*").files, [])[0])

    def read() -> Iterator[Document | Skipped]:
        from datasets.exceptions import DatasetsError

        hint = "give a folder or a file that holds its text"
        rows = load_rows(source, hint, name, config, split=split, streaming=streaming)
        try:
            yield from in_pieces(
                (_row(f"{split}:{number}", row, text_field) for number, row in enumerate(rows)), filters
            )
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{source}: cannot load: {' '.join(str(error).split())}") from error

    digest = hashlib.sha256(json.dumps(identity).encode())
    return Corpus(source, digest.hexdigest(), None, read, filters=filters)


def _row(name: str, row: object, text_field: str) -> Document | Skipped:
    try:
        return Document(name, text_of(row, text_field))
    except BadRecord as bad:
        return Skipped(name, bad.reason, bad.detail)


def parse_hub_name(source: str) -> tuple[str, str | None, str]:
    """`hf:NAME[@CONFIG][:SPLIT]` -> (name, config or None, split; default train)."""
    rest = source.removeprefix("hf:")
    if rest and Path(rest).is_dir():
        return rest, None, "train"
    name, _, split = rest.partition(":")
    name, _, config = name.partition("@")
    if not name:
        raise DataError(f"{source}: no data set named; write hf:NAME[@CONFIG][:SPLIT]")
    return name, config or None, split or "train"
