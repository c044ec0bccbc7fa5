"""`nanochat plan`: what a configuration will cost, before anything runs."""

from typing import Annotated

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def plan(
    ctx: typer.Context,
    preset: Presets = [],  # noqa: B006 - Typer copies it
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    tokens: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Training tokens; default: what its steps and time allow."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of the peak that training reaches: your assumption.")
    ] = 0.5,
    peak_flops: Annotated[
        float | None, typer.Option(min=1, metavar="F", help="FLOP/s of the device; default: train.device, measured.")
    ] = None,
) -> None:
    """Print a configuration's parameters, FLOPs per token, peak training memory, file, llama.cpp support and time."""
    session = session_of(ctx)
    resolved = resolve(session, preset, config, overrides, default_preset="quickstart")
    from nanochat_cli.diagnose.plan.show import show_plan

    show_plan(resolved, session.reporter, tokens=tokens, utilisation=utilisation, peak_flops=peak_flops)
