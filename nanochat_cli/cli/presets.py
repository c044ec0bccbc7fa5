"""`nanochat presets`: what can be given to `--preset`, and how large it truly is."""

import shutil
import sys
from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of

NARROW = 90
"""In a terminal with fewer columns, only names, yes or no, and descriptions are shown."""

app = typer.Typer(add_completion=False, invoke_without_command=True)


@app.callback()
def presets(ctx: typer.Context) -> None:
    """List presets with their true sizes and whether llama.cpp runs their models, or show one."""
    if ctx.invoked_subcommand is None:
        _list(ctx)


@app.command("list")
def list_presets(ctx: typer.Context) -> None:
    """List every preset. Sizes are counted, not taken from the name; overlays change a model preset."""
    _list(ctx)


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="As in the list.")],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="With every other key, from its base or by default.")
    ] = False,
) -> None:
    """Show a preset's file; --resolved adds the keys of its base and all defaults."""
    from nanochat_cli.config.load import config_to_toml, resolve_config
    from nanochat_cli.config.presets import load

    session = session_of(ctx)
    preset = load(name)
    config = resolve_config([name])
    base = preset.base and preset.base.name
    session.reporter.result({"name": preset.name, "base": base, "config": config.model_dump(mode="json")})
    session.reporter.write(config_to_toml(config) if resolved else preset.path.read_text(encoding="utf-8"))


def _list(ctx: typer.Context) -> None:
    from nanochat_cli.config.load import resolve_config
    from nanochat_cli.config.presets import available
    from nanochat_cli.config.size import format_parameters
    from nanochat_cli.formats.gguf.architecture import destination_of

    session = session_of(ctx)
    entries: list[dict[str, object]] = []
    rows: list[list[object]] = []
    for preset in available():
        entry: dict[str, object] = {"name": preset.name, "base": preset.base and preset.base.name}
        entry |= {"kind": "overlay", "parameters": None}
        columns: list[object] = [preset.name, "overlay", "", ""]
        if not preset.is_overlay:
            model = resolve_config([preset.name]).model
            count, destination = model.count_parameters().total, destination_of(model)
            entry |= {"kind": "model", "parameters": count, "arch": destination.arch}
            entry |= {"llama_cpp": destination.runs_in_llama_cpp, "llama_cpp_reason": destination.reason}
            columns = [preset.name, format_parameters(count), destination.arch, destination.answer]
        entries.append({**entry, "description": preset.description})
        rows.append([*columns, preset.description])
    session.reporter.result({"presets": entries})
    if session.quiet:
        session.reporter.write("".join(f"{row[0]}\n" for row in rows))
    else:
        header = ("name", "parameters", "GGUF architecture", "runs in llama.cpp", "description")
        if sys.stdout.isatty() and shutil.get_terminal_size().columns < NARROW:
            header = ("name", "llama.cpp", "description")
            rows = [[row[0], str(row[3]).partition(":")[0], row[-1]] for row in rows]
        session.reporter.table("presets", header, rows)
        if not all(entry.get("llama_cpp", True) for entry in entries):
            session.reporter.info("for a file that llama.cpp runs, add --preset llama-cpp after the model's preset")
