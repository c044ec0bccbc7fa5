"""`nanochat inspect`: what a run looks like inside."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import Checkpoint, Run
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def inspect(
    ctx: typer.Context,
    run: Run = None,
    checkpoint: Checkpoint = None,
    mhc: Annotated[bool, typer.Option("--mhc", help="The residual streams instead of the ternary layers.")] = False,
    isometry: Annotated[bool, typer.Option("--isometry", help="How far the matrices are from isometries.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For the picture; default: RUN/inspect.")] = None,
) -> None:
    """Show the health of a run's ternary layers; --mhc: of its residual streams; --isometry: of its singular values."""
    from nanochat_cli.formats.run.find import find_run, which_checkpoint

    run_dir = find_run(run)
    which = which_checkpoint(run_dir, checkpoint)
    from nanochat_cli.diagnose.inspect.inspect_run import inspect_run

    out = out or run_dir / "inspect"
    inspect_run(run_dir, which, out, session_of(ctx).reporter, mhc=mhc, isometry=isometry)
