"""`nanochat validate`: does this installation compute what it should?"""

import typer

from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def validate(ctx: typer.Context) -> None:
    """Check the kernels of this machine against their definition and against llama.cpp, in under a minute.

    The same products by the reference, the compiled CPU kernels, the Triton kernels (under their interpreter without a
    GPU) and llama.cpp: integers bit for bit, floats within 1e-5. Exit code 4 when something differs; what cannot run
    here is named. One stage so far; training, export and reload are checked by `make validate`.
    """
    from nanochat_cli.validation.stages import validate

    validate(session_of(ctx).reporter)
