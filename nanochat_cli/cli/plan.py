"""`nanochat plan`: what a configuration will cost, before anything runs."""

from typing import Annotated, Literal

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import session_of
from nanochat_cli.training.distributed.ranks import require_shareable

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
    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Ranks that train together, each on a device of its own.")
    ] = None,
    mode: Annotated[Literal["owned", "fsdp"], typer.Option(help="How they share the work.")] = "owned",
    per_machine: Annotated[int, typer.Option(min=1, metavar="N", help="Of --devices, so many are in a machine.")] = 8,
) -> None:
    """Print a configuration's parameters, FLOPs per token, peak training memory, file, llama.cpp support and time."""
    session = session_of(ctx)
    resolved = resolve(session, preset, config, overrides, default_preset="quickstart")
    if devices is not None:
        resolved.distributed.mode = mode
        require_shareable(resolved, devices)
    from nanochat_cli.diagnose.plan.show import show_plan

    show_plan(
        resolved,
        session.reporter,
        tokens=tokens,
        utilisation=utilisation,
        peak_flops=peak_flops,
        ranks=devices,
        per_machine=per_machine,
    )
