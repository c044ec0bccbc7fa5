"""`nanochat generate`: continue a prompt, or fill a gap, with a run or an exported file."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nanochat_cli.cli.options import Backend, Checkpoint
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError, DataError, reason

if TYPE_CHECKING:
    from nanochat_cli.data.fim import Gap

app = typer.Typer(add_completion=False)


@app.command()
def generate(
    ctx: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A run or a .gguf file; default: the latest run.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to continue; empty: a new document.")] = "",
    infill: Annotated[
        str | None,
        typer.Option(metavar="FILE:LINE:COL", help="Write what belongs at this place of a file, both counted from 1."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most probable token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from the K most probable tokens; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the smallest set that reaches this probability; 1: from all.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from tokens at least this share as probable as the best; 0: all.")
    ] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens already seen become less probable.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same text.")] = 0,
    stop: Annotated[list[str], typer.Option(metavar="TEXT", help="End before this text; may be repeated.")] = [],  # noqa: B006
    stream: Annotated[bool, typer.Option(help="Show text as it comes.")] = True,
    checkpoint: Checkpoint = None,
    backend: Backend = None,
    speculate: Annotated[
        int,
        typer.Option(min=0, max=4, metavar="N", help="Guess N tokens ahead with the run's own MTP modules; 0: off."),
    ] = 0,
) -> None:
    """Continue a prompt, or fill a gap in a file, with a run or a GGUF file that nanochat wrote.

    The text goes to standard output; with --infill it is only what belongs at that place.
    """
    from nanochat_cli.formats.run.find import find_run_or_gguf, which_checkpoint

    if infill is not None and prompt:
        raise ConfigError("--infill and --prompt are two ways to say where to begin: leave one out")
    start = prompt if infill is None else _gap(infill)
    session = session_of(ctx)
    path = find_run_or_gguf(target)
    session.engine.generate(
        path,
        start,
        which=which_checkpoint(path, checkpoint),
        stream=stream,
        backend=backend,
        speculate=speculate,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop),
    )
    if session.verbose:
        rates: Any = session.reporter.results["tokens_per_second"]
        for what, rate in rates.items():
            if rate is not None:
                print(f"{what} tokens: {rate:,.0f} per second", file=sys.stderr)


def _gap(place: str) -> "Gap":
    """The text on both sides of FILE:LINE:COL, as an editor counts. Raises ConfigError and DataError."""
    from nanochat_cli.data.fim import Gap

    match place.rsplit(":", 2):
        case [name, line, column] if name and line.isdecimal() and column.isdecimal():
            number, offset = int(line) - 1, int(column) - 1
        case _:
            raise ConfigError(f"--infill {place}: name a file, a line and a column, such as src/main.rs:12:5")
    try:
        lines = Path(name).read_bytes().decode("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--infill {place}: cannot read {name}: {reason(error)}") from error
    if not 0 <= number < len(lines):
        raise DataError(f"--infill {place}: {name} has lines 1 to {len(lines)}")
    if not 0 <= offset <= len(lines[number]):
        raise DataError(f"--infill {place}: line {line} has columns 1 to {len(lines[number]) + 1}")
    before, after = lines[number][:offset], lines[number][offset:]
    return Gap("\n".join([*lines[:number], before]), "\n".join([after, *lines[number + 1 :]]))
