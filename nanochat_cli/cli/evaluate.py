"""`nanochat eval`: bits per byte of a run on its held-out documents."""

import typer

from nanochat_cli.cli.options import Run
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(ctx: typer.Context, run: Run = None) -> None:
    """Measure a run on the documents that training never saw: loss, perplexity, accuracy, bits per byte."""
    from nanochat_cli.runs import find_run

    session_of(ctx).engine.evaluate(find_run(run))
