"""`nanochat export`: write a run as a file that other programs can run."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import Checkpoint, Overrides, Run
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import DataError

app = typer.Typer(add_completion=False)


@app.command()
def export(
    ctx: typer.Context,
    run: Run = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write GGUF (the only format so far).")] = True,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: RUN/model.gguf.")] = None,
    tensor_type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="auto, tq2_0, tq1_0, q2_0, q4_0, f16 or f32; default: auto."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Embeddings and head: f16 or f32; default: f16.")
    ] = None,
    verify: Annotated[
        bool | None, typer.Option("--verify/--no-verify", help="Read the file back and compare; default: verify.")
    ] = None,
    checkpoint: Checkpoint = None,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
) -> None:
    """Write a GGUF file with the codes and scales that were trained, and verify it.

    The file is read back and compared bit for bit; with xllamacpp installed, llama.cpp's log-probabilities
    are compared too.
    """
    from nanochat_cli.config.load import run_config
    from nanochat_cli.formats.run.find import find_run, require_writable, which_checkpoint

    session = session_of(ctx)
    folder = find_run(run)
    config = run_config(
        folder,
        overrides,
        {
            "--type": {"export.type": tensor_type},
            "--head": {"export.head": head},
            "--verify": {"export.verify": verify},
        },
    )
    which = which_checkpoint(folder, checkpoint)
    out = out or folder / "model.gguf"
    if out.is_dir():
        raise DataError(f"--out {out}: is a folder; name a file in it, such as {out / 'model.gguf'}")
    require_writable(out)
    session.engine.export(folder, out, config.export, which)
