"""`nanochat inspect`: what a run looks like inside."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import Run
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    ctx: typer.Context,
    run: Run = None,
    mhc: Annotated[bool, typer.Option("--mhc", help="The residual streams instead of the ternary layers.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For the picture; default: RUN/inspect.")] = None,
) -> None:
    """Show the health of a run's ternary layers, or with --mhc how its residual streams are mixed."""
    from nanochat_cli.runs import find_run

    found = find_run(run)
    session_of(ctx).engine.inspect(found, mhc=mhc, out=out or found / "inspect")
