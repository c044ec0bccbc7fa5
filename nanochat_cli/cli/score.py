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
        Path | None, typer.Option(metavar="FILE", help="Where to write them; default: RUN/scores.safetensors.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Only the N tokens that a run of the same seed and sequence length reads first."
        ),
    ] = None,
) -> None:
    """Write the loss of every training token under a run's model, for collider.scores.

    With collider.score = excess they are subtracted from the loss of the model that trains; with ce they choose tokens
    by themselves, before the forward pass, which then keeps less for the backward pass.
    """
    from nanochat_cli.formats.run.find import find_run, which_checkpoint

    found = find_run(run)
    which = which_checkpoint(found, checkpoint)
    session_of(ctx).engine.score(found, which, out=out or found / "scores.safetensors", max_tokens=max_tokens)
