"""`nanochat score`: how well a run predicts every token that another run will train on."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.options import Checkpoint, Run
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def score(
    ctx: typer.Context,
    run: Run = None,
    checkpoint: Checkpoint = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File to write; default: RUN/scores.safetensors.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Only the N tokens that a run of the same seed and sequence length reads first."
        ),
    ] = None,
) -> None:
    """Write the loss of every training token under a run's model, for collider.scores.

    With collider.score = excess they are subtracted from the loss of the model in training; with ce they alone choose
    tokens, before the forward pass, which then keeps less for the backward pass.
    """
    from nanochat_cli.formats.run.find import find_run, which_checkpoint

    run_dir = find_run(run)
    which = which_checkpoint(run_dir, checkpoint)
    session_of(ctx).engine.score(run_dir, which, out=out or run_dir / "scores.safetensors", max_tokens=max_tokens)
