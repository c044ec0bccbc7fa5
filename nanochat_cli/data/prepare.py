"""Prepare a data set: split a corpus, train a tokenizer on the train side, encode both sides into shards.

Two passes over the source: the first (`scan`) decides which documents are taken and which of them are held out, and
samples text for the tokenizer; the second encodes, in the memory of a few batches. All is written beside an existing
data set, which is replaced only by a complete one; preparing again with the same settings and source only checks file
sizes.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from nanochat_cli.atomic_write import staging, write_atomically
from nanochat_cli.config.schema import Config, DataConfig
from nanochat_cli.config.source_parts import Part
from nanochat_cli.data import split
from nanochat_cli.data.card import announce, card
from nanochat_cli.data.chat import chat_tokens
from nanochat_cli.data.contamination import ProblemRuns
from nanochat_cli.data.conversation_files import open_conversations
from nanochat_cli.data.corpus import NAMED, Corpus, open_corpus
from nanochat_cli.data.documents import as_named, printable
from nanochat_cli.data.filters import NO_FILTERS, Filters
from nanochat_cli.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, Manifest, Split, TokenizerInfo, read_manifest
from nanochat_cli.data.mixed_corpus import mixed
from nanochat_cli.data.scan import scan
from nanochat_cli.data.shards import CARD, STAGED, TOKENIZER, install_staged, verify_files
from nanochat_cli.data.text_files import LONG_LINE
from nanochat_cli.data.token_documents import TokenSettings
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.data.write_sides import location_of, write_sides
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.folders import held_folder
from nanochat_cli.home import has_home
from nanochat_cli.report.quantities import counted, format_duration
from nanochat_cli.report.reporter import FIRST_LINE_AFTER, LINE_EVERY, Reporter

Settings = dict[str, str | int | float | bool | None]


def prepare_dataset(
    source: str,
    out: Path,
    config: Config,
    reporter: Reporter,
    before_replacing: Callable[[str], None] = lambda changed: None,
) -> Manifest:
    """Make `out` a data set of `source` (see `open_corpus`) under `[data]`, `[tokenizer]` and `model.vocab_size`.

    `data.sources`, if there are any, take the place of `source`.

    Returns at once if it already is one. before_replacing: called with what has changed before a complete data set is
    replaced by another; if it raises, everything stays as it is. Raises DataError if the source is unusable, if it
    holds fewer than two distinct documents, or if `out` cannot be written.
    """
    corpus = _open(source, config, out)
    settings = _settings(corpus, config)
    fingerprint = _fingerprint(settings, corpus)
    if (prepared := _already_prepared(out, fingerprint, settings, reporter)) is not None:
        return prepared
    if (old := _whole_manifest(out)) is not None and (changed := _changed(settings, old)):
        before_replacing(", ".join(changed))
    try:
        with held_folder(out, "prepares", waiting=reporter.info):
            install_staged(out)
            # Another process may have prepared it while this one waited.
            if (prepared := _already_prepared(out, fingerprint, None, reporter)) is not None:
                return prepared
            return _build(corpus, out, config, settings, fingerprint, reporter, before_replacing)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot write the data set: {error.strerror or error}; "
            "free space or choose another folder"
        ) from error


def cached_dataset(config: Config, reporter: Reporter) -> Path:
    """The folder of `data.path`, or of the source prepared in the cache ($NANOCHAT_CACHE or ~/.cache/nanochat)."""
    if config.data.path is not None:
        return config.data.path
    source = config.data.source
    corpus = _open(source, config)
    fingerprint = _fingerprint(_settings(corpus, config), corpus)
    plain = "mixture" if corpus.parts else Path(source.removeprefix("hf:")).name or "corpus"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)
    folder = cache_folder() / "datasets" / f"{name}-{fingerprint[:12]}"
    prepare_dataset(source, folder, config, reporter)
    return folder


def source_of(manifest: Manifest, data: DataConfig) -> Corpus:
    """The corpus that a data set was made from; data: gives its glob. Raises DataError if it has changed since."""
    for setting, what in (("data.format", "token ids"), ("data.chat", "conversations")):
        if setting in manifest.settings:
            raise DataError(f"{manifest.source}: holds {what}, not text, which loader.on_the_fly needs; turn it off")
    field, filters = as_named(str(manifest.settings["data.text_field"])), _filters(manifest.settings)

    def opened(source: str, location: str | None) -> Corpus:
        if location is not None and Path(as_named(location)).exists():
            source = location  # the path as it was given may be relative to another folder
        return open_corpus(as_named(source), data.glob, field, streaming=data.streaming, filters=filters)

    parts = [Part(part.name, as_named(part.source), part.weight) for part in manifest.parts]
    if parts:
        corpus = mixed(parts, [opened(part.source, part.location) for part in manifest.parts])
    else:
        corpus = opened(str(manifest.settings["source"]), manifest.location)
    if _fingerprint(manifest.settings, corpus) != manifest.fingerprint:
        raise DataError(
            f"{manifest.source}: has changed since the data set was made (or data.glob has); run `nanochat tokenize` "
            "again"
        )
    return corpus


def cache_folder() -> Path:
    """$NANOCHAT_CACHE or ~/.cache/nanochat. Raises ConfigError if this user has no home folder."""
    if not os.environ.get("NANOCHAT_CACHE") and not has_home():
        raise ConfigError("this user has no home folder: set NANOCHAT_CACHE to a folder for prepared data sets")
    return Path(os.environ.get("NANOCHAT_CACHE") or Path.home() / ".cache" / "nanochat")


# -- whether there is anything to do -----------------------------------------------------------------------


def _open(source: str, config: Config, output: Path | None = None) -> Corpus:
    data = config.data
    if data.chat:
        if config.tokenizer.path is None:
            raise ConfigError(
                "data.chat needs the tokenizer of the model that is to be fine-tuned: name its run or its "
                "tokenizer.json with --tokenizer (tokenizer.path)"
            )
        return open_conversations(source, data.streaming, Filters(gitignore=False, secrets=data.secrets))
    tokens = TokenSettings(data.format, data.eot_id, config.tokenizer.path)
    filters = Filters(data.gitignore, data.max_file_bytes, data.generated, data.secrets, data.functions)

    def opened(one: str) -> Corpus:
        return open_corpus(one, data.glob, data.text_field, data.streaming, output, tokens, filters)

    return mixed(data.parts, [opened(part.source) for part in data.parts]) if data.parts else opened(source)


def _filters(settings: Settings) -> Filters:
    """The filters under which a data set was made; one that is older than they had none."""
    given = {name: settings[f"data.{name}"] for name in Filters._fields if f"data.{name}" in settings}
    return NO_FILTERS._replace(**given)


def _settings(corpus: Corpus, config: Config) -> Settings:
    """All that the result depends on, except for the source's content."""
    data, tokenizer = config.data, config.tokenizer
    settings: Settings = {
        "source": printable(corpus.source),
        "data.text_field": printable(data.text_field),
        "data.max_bytes": data.max_bytes,
        "data.val_fraction": data.val_fraction,
        "data.split": split.METHOD,
        **({"data.chat": True} if data.chat else {"model.vocab_size": config.model.vocab_size}),
    }
    filters = corpus.filters._replace(gitignore=corpus.ignored > 0)
    settings |= {
        f"data.{name}": value for name, value in filters._asdict().items() if value != getattr(NO_FILTERS, name)
    }
    if data.dedup != "none":
        settings["data.dedup"] = data.dedup
    if data.contamination != "count":
        version = f", problems {ProblemRuns().version}" if data.contamination == "remove" else ""
        settings["data.contamination"] = data.contamination + version
    if corpus.tokens is not None:
        settings |= {"data.format": corpus.tokens.format, "data.eot_id": corpus.tokens.eot_id}
    if tokenizer.path is None:
        settings |= {
            "tokenizer.pre": tokenizer.pre,
            "tokenizer.max_token_length": tokenizer.max_token_length,
            "tokenizer.train_bytes": tokenizer.train_bytes,
        }
    else:
        try:
            settings["tokenizer.path"] = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{tokenizer.path}: cannot read the tokenizer: {error.strerror}") from error
    return settings


def _fingerprint(settings: Settings, corpus: Corpus) -> str:
    text = json.dumps([FORMAT_VERSION, settings, corpus.fingerprint], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _already_prepared(out: Path, fingerprint: str, settings: Settings | None, reporter: Reporter) -> Manifest | None:
    """The manifest of `out` if it is up to date; otherwise reports why not, if `settings` are given."""
    if not (out / MANIFEST).exists():
        return None
    try:
        manifest = read_manifest(out)
        verify_files(out, manifest, "size")
    except DataError as error:
        if settings is not None:
            reporter.warn(f"{error}: preparing it again")
        return None
    if manifest.fingerprint == fingerprint:
        reporter.info(f"{out}: already prepared ({_summary(manifest)})")
        return manifest
    if settings is not None:
        changed = ", ".join(_changed(settings, manifest))
        reporter.info(f"{out}: {changed or 'the source'} changed: {'preparing' if changed else 'reading'} it again")
    return None


def _changed(settings: Settings, old: Manifest) -> list[str]:
    keys = settings.keys() | old.settings.keys()
    return sorted(key for key in keys if settings.get(key) != old.settings.get(key))


def _whole_manifest(out: Path) -> Manifest | None:
    """None if `out` is no data set, or a damaged one. Raises DataError if it cannot be read: it may be a good one."""
    try:
        manifest = read_manifest(out)
        verify_files(out, manifest, "size")
    except DataError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError | NotADirectoryError):
            raise
        return None
    return manifest


# -- the two passes ----------------------------------------------------------------------------------------


def _build(
    corpus: Corpus,
    out: Path,
    config: Config,
    settings: Settings,
    fingerprint: str,
    reporter: Reporter,
    before_replacing: Callable[[str], None],
) -> Manifest:
    given = None
    if config.tokenizer.path is not None:
        given = Tokenizer.load(config.tokenizer.path)
        if config.data.chat:
            chat_tokens(given)
        else:
            given = given.padded_to(config.model.vocab_size)
        if corpus.tokens is not None:
            eot = given.eos_id if corpus.tokens.eot_id is None else corpus.tokens.eot_id
            reporter.info(f"{corpus.source}: token files ({corpus.tokens.format}), id {eot} between documents")
    found = scan(corpus, out, config, reporter)
    if (old := _whole_manifest(out)) is not None and not _changed(settings, old):
        if old.content == found.content:  # files were copied or touched, but no document has changed
            manifest = old.model_copy(update={"fingerprint": fingerprint})
            _write_manifest(out, manifest)
            reporter.info(f"{out}: the same documents: already prepared ({_summary(manifest)})")
            return manifest
        before_replacing("the source")
    _warn_of_files(corpus, reporter)
    tokenizer = given or _tokenizer(found.sample, config, reporter)
    definition = tokenizer.to_str().encode()
    with staging(out, STAGED) as staged:
        write_atomically(staged / TOKENIZER, definition)
        written = write_sides(corpus, found, tokenizer, staged, config, reporter)
        manifest = Manifest(
            source=printable(corpus.source),
            location=location_of(corpus.source) if corpus.files and not corpus.parts else None,
            fingerprint=fingerprint,
            content=found.content,
            settings=settings,
            tokenizer=TokenizerInfo(
                sha256=hashlib.sha256(definition).hexdigest(),
                vocab_size=tokenizer.vocab_size,
                unused=len(tokenizer.unused_ids),
                pre=tokenizer.pre,
            ),
            train=written.train,
            val=written.val,
            parts=written.parts,
            near_duplicates=found.near_duplicates,
            families=written.families,
            contamination=found.contamination,
            origin=written.origin,
            secrets=dict(sorted(corpus.secrets.items())),
            chat=written.chat,
            skipped=dict(sorted((corpus.skipped + found.left_out).items())),
            left_out=[printable(f"{item.id}: {item.reason}") for item in corpus.left_out],
            long_lines=[printable(name) for name in corpus.long_lines[:NAMED]],
        )
        write_atomically(staged / CARD, card(manifest).encode())
        _write_manifest(staged, manifest)
    install_staged(out)
    announce(manifest, reporter)
    reporter.info(f"{out}: {_summary(manifest)}")
    return manifest


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomically(folder / MANIFEST, (manifest.model_dump_json(indent=2) + "\n").encode())


def _warn_of_files(corpus: Corpus, reporter: Reporter) -> None:
    """Warn of what was left out, by reason and by name, and of files used although they look minified."""
    if corpus.skipped:
        reporter.warn(printable(f"{corpus.source}: left out {corpus.what_was_left_out()}"))
    if corpus.long_lines:
        reporter.warn(
            printable(
                f"{corpus.source}: used {len(corpus.long_lines)} files with lines of more than {LONG_LINE:,} bytes, "
                f"which look minified or generated: {', '.join(corpus.long_lines[:NAMED])}"
                f"{', …' if len(corpus.long_lines) > NAMED else ''}; choose others with --glob"
            )
        )


def _tokenizer(sample: list[bytes], config: Config, reporter: Reporter) -> Tokenizer:
    vocab_size = config.model.vocab_size
    tokenizer = _train_tokenizer(sample, config, reporter)
    if tokenizer.unused_ids:
        reporter.warn(
            f"the corpus supports only {vocab_size - len(tokenizer.unused_ids)} tokens; the other "
            f"{len(tokenizer.unused_ids)} of model.vocab_size = {vocab_size} are unused [PAD] entries"
        )
    return tokenizer


def _train_tokenizer(sample: list[bytes], config: Config, reporter: Reporter) -> Tokenizer:
    """Empties `sample`, which the second pass does not need. Reports progress, since merging may take minutes."""
    started, said = time.monotonic(), FIRST_LINE_AFTER - LINE_EVERY
    with ExitStack() as reading:
        progress = reading.enter_context(
            reporter.progress("reading for the tokenizer", total=sum(map(len, sample)), unit="B")
        )

        def texts() -> Iterator[str]:
            while sample:
                content = sample.pop()
                progress.advance(len(content))
                yield content.decode("utf-8", "ignore")  # a cut document may end inside a character

        def waiting() -> None:
            nonlocal said
            elapsed = time.monotonic() - started
            if not sample and elapsed - said >= LINE_EVERY:
                reading.close()
                said = elapsed
                reporter.info(f"training the tokenizer: merging, {format_duration(elapsed)} so far")

        return Tokenizer.train(
            texts(),
            config.model.vocab_size,
            pre=config.tokenizer.pre,
            max_token_length=config.tokenizer.max_token_length,
            waiting=waiting,
        )


def _summary(manifest: Manifest) -> str:
    def part(name: Split) -> str:
        side = manifest.split(name)
        return f"{name} {counted(side.documents, 'document')}, {side.bytes:,} bytes, {side.tokens:,} tokens"

    ratio = manifest.train.bytes / manifest.train.tokens
    return f"{'; '.join(part(name) for name in SPLITS)}; {ratio:.2f} bytes per token"
