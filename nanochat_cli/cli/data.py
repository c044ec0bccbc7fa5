"""`nanochat data export`: a data set as the token files that other trainers read."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from nanochat_cli.cli.session import session_of

FormatName = Literal["nanotron", "megatron", "nanogpt", "llmc"]
"""As `config.sections.data.TokenFormat`, which imports pydantic."""

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Export a data set as token files of other programs; `nanochat tokenize --source` takes them over."""


@app.command()
def export(
    ctx: typer.Context,
    dataset: Annotated[Path, typer.Argument(metavar="DATA", help="A folder that nanochat tokenize wrote.")],
    token_format: Annotated[FormatName, typer.Option("--format", help="The files to write.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """Write both sides of a data set, train and val, and its tokenizer; taking them over gives the same shards."""
    from nanochat_cli.data.shards import ShardReader
    from nanochat_cli.data.token_export import export_tokens
    from nanochat_cli.formats.run.find import require_writable

    reporter = session_of(ctx).reporter
    require_writable(out)
    reader = ShardReader(dataset)
    files = export_tokens(reader, token_format, out)
    tokenizer = reader.tokenizer
    reporter.table(str(out), ("file", "bytes"), [(path.name, path.stat().st_size) for path in files])
    reporter.info(f"between documents: id {tokenizer.eos_id} ({tokenizer.eos_token}) of {out / 'tokenizer.json'}")
    reporter.result({"folder": str(out), "format": token_format, "files": [path.name for path in files]})
