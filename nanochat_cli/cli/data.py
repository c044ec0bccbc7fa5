"""`nanochat data`: the card of a data set, and its export as the token files that other trainers read."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from nanochat_cli.cli.session import session_of

FormatName = Literal["nanotron", "megatron", "nanogpt", "llmc"]
"""As `config.sections.data.TokenFormat`, which imports pydantic."""

CARD = "card"


class DataGroup(TyperGroup):
    """`nanochat data DATA` is short for `nanochat data card DATA`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Take an argument that is no command for a data set. ctx: Typer's private Context class."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else [CARD, *args])


app = typer.Typer(cls=DataGroup, add_completion=False, no_args_is_help=True)


@app.callback()
def data() -> None:
    """Print the card of a data set, or export it as token files that `nanochat tokenize --source` takes over."""


@app.command(CARD)
def print_card(
    ctx: typer.Context,
    dataset: Annotated[Path, typer.Argument(metavar="DATA", help="A folder that nanochat tokenize wrote.")],
) -> None:
    """Print what a data set holds: sources, languages, licences, duplicates, what was left out, tokens."""
    from nanochat_cli.data.card import card
    from nanochat_cli.data.manifest import read_manifest

    reporter = session_of(ctx).reporter
    manifest = read_manifest(dataset)
    reporter.write(card(manifest))
    reporter.result({"dataset": str(dataset), **manifest.model_dump(mode="json")})


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
