"""`nanochat quickstart`: the whole chain on the embedded corpus, with one command."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of
from nanochat_cli.cli.train import require_startable

app = typer.Typer(add_completion=False)


@app.command()
def quickstart(
    ctx: typer.Context,
    preset: Presets = [],  # noqa: B006 - Typer copies it
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the run; default: runs/quickstart-N.")
    ] = None,
) -> None:
    """Tokenize the Python standard library, train the quickstart preset, measure it, export it, run it in llama.cpp."""
    session = session_of(ctx)
    options = {} if out is None else {"--out": {"run.dir": out.parent.as_posix(), "run.name": out.name}}
    resolved = resolve(session, preset, config, overrides, default_preset="quickstart", options=options)
    require_startable(resolved, "quickstart")
    session.engine.quickstart(resolved)
