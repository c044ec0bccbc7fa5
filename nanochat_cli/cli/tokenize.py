"""`nanochat tokenize`: turn a corpus into a tokenizer and shards."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import DataError

app = typer.Typer(add_completion=False)


@app.command()
def tokenize(
    ctx: typer.Context,
    source: Annotated[
        list[str],
        typer.Option(
            metavar="SRC",
            help="stdlib, a file or folder, .jsonl, .parquet, token files, or hf:NAME (@CONFIG, :SPLIT). "
            "Several: NAME=SRC:WEIGHT each.",
        ),
    ] = [],  # noqa: B006 - Typer copies it
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the data set; default: data/NAME-OF-SOURCE.")
    ] = None,
    glob: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Which files of a folder to read, e.g. '*.rs'.")
    ] = None,
    text_field: Annotated[
        str | None, typer.Option(metavar="NAME", help="Field of a record with its text; a.b for a nested one.")
    ] = None,
    functions: Annotated[
        bool, typer.Option("--functions", help="Take only the short free functions of Python and Rust files.")
    ] = False,
    chat: Annotated[
        bool, typer.Option("--chat", help="Records are conversations or instructions, to fine-tune on the answers.")
    ] = False,
    vocab_size: Annotated[int | None, typer.Option(help="Entries of the tokenizer; default: the preset's.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(metavar="FILE|RUN", help="Use this tokenizer.json, or a run's, instead of training one."),
    ] = None,
    token_format: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Of token files: nanotron, megatron, nanogpt or llmc; default: recognise them.",
        ),
    ] = None,
    eot_id: Annotated[
        int | None,
        typer.Option(metavar="ID", help="The id between the documents of token files; default: the tokenizer's."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another data set in DIR; runs that used it lose it.")
    ] = False,
    preset: Presets = [],  # noqa: B006
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Train a byte-level BPE tokenizer on a corpus and encode it into shards, or take over token files.

    Repeating the command with the same input changes nothing; after an interruption it finishes the work. A data set
    with other documents or settings is replaced only with --force.
    """
    from nanochat_cli.config.source_parts import is_part
    from nanochat_cli.formats.run.find import require_writable

    session = session_of(ctx)
    if tokenizer is not None and tokenizer.is_dir():
        tokenizer = tokenizer / "tokenizer.json"
    several = len(source) > 1 or (source and is_part(source[0]) and not Path(source[0]).exists())
    resolved = resolve(
        session,
        preset,
        config,
        overrides,
        default_preset="quickstart",
        options={
            "--source": {"data.sources": source} if several else {"data.source": source[0] if source else None},
            "--glob": {"data.glob": glob},
            "--text-field": {"data.text_field": text_field},
            "--chat": {"data.chat": chat or None},
            "--functions": {"data.functions": functions or None},
            "--vocab-size": {"model.vocab_size": vocab_size},
            "--format": {"data.format": token_format},
            "--eot-id": {"data.eot_id": eot_id},
            "--tokenizer": {"tokenizer.path": tokenizer and tokenizer.as_posix()},
        },
    )
    data = resolved.data
    sources = [part.source for part in data.parts] or [data.source]
    for option, path in (*(("--source", _local_path(one)) for one in sources), ("--tokenizer", tokenizer)):
        if path is not None and not path.exists():
            raise DataError(f"{option} {path}: no such file or folder")
    out = out or Path("data") / ("-".join(part.name for part in data.parts) or _name_of(data.source))
    require_writable(out)
    session.engine.tokenize(data.named_source, out, resolved, replace=force)


def _local_path(source: str) -> Path | None:
    """The source's path, unless it needs no file."""
    return None if source == "stdlib" or source.startswith("hf:") else Path(source)


def _name_of(source: str) -> str:
    """`hf:org/name:train` -> `name`; `/src/crates/` -> `crates`."""
    name = source.removeprefix("hf:").partition("@")[0].partition(":")[0] if source.startswith("hf:") else source
    return Path(name).resolve().stem or "corpus"
