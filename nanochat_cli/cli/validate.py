"""`nanochat validate`: does this installation compute what it should?"""

from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def validate(
    ctx: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the slow checks; the output names them.")] = False,
) -> None:
    """Check the whole chain on a tiny model, in under a minute.

    Kernels against their definition, Triton and llama.cpp; mHC-lite; the tokenizer; training, resuming and exporting a
    small run; the file against the model, in our runtime and in llama.cpp; generation, speculative decoding, and the
    training methods together. Needs no data and leaves nothing behind. Exit code 4 when a stage fails; a part that is
    not installed is named, which is not a failure.
    """
    from nanochat_cli.diagnose.validate.stages import validate

    validate(session_of(ctx).reporter, quick=quick)
