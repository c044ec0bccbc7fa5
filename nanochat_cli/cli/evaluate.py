"""`nanochat eval`: bits per byte of a run on its held-out documents, or another suite with `--suite`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from nanochat_cli.cli.options import Backend, Checkpoint
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError

app = typer.Typer(add_completion=False)
_DRAWING = "Suites that draw completions"


@app.command()
def evaluate(
    ctx: typer.Context,
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A run or a .gguf file; default: the latest run.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            metavar="SUITE",
            help="bpb (by language), completion, memorised, compile, python, rust, humaneval-python, humaneval-rust, "
            "or a file of problems. Default: held-out documents as a whole.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Completions of each problem; default: 10, or the largest k.",
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    ks: Annotated[
        str, typer.Option("--k", metavar="K,K,…", help="pass@k for each of these.", rich_help_panel=_DRAWING)
    ] = "1",
    temperatures: Annotated[
        str,
        typer.Option("--temperature", metavar="T,T,…", help="Draw at each of these.", rich_help_panel=_DRAWING),
    ] = "0.2",
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Only the first N problems.", rich_help_panel=_DRAWING)
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in a completion.", rich_help_panel=_DRAWING)
    ] = 256,
    top_p: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Draw from the smallest set that reaches this probability; 1: from all.",
            rich_help_panel=_DRAWING,
        ),
    ] = 0.95,
    seed: Annotated[
        int, typer.Option(min=0, help="The same seed draws the same completions.", rich_help_panel=_DRAWING)
    ] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an evaluation that was stopped.", rich_help_panel=_DRAWING)
    ] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Completions and results; default: beside the target.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A data set for suites on documents; default: the run's.")
    ] = None,
    checkpoint: Checkpoint = None,
    backend: Backend = None,
) -> None:
    """Measure a model on documents that training never saw, or on programs that it writes.

    Without --suite: loss, perplexity, accuracy and bits per byte of a run on all its held-out documents. Programs are
    compiled and run in a sandbox.
    """
    from nanochat_cli.evaluation.suites import BITS_PER_BYTE, COMPLETION, MEMORISED, SAMPLES, SuiteOptions
    from nanochat_cli.formats.run.find import find_run_or_gguf, which_checkpoint

    session = session_of(ctx)
    path = find_run_or_gguf(target)
    which = which_checkpoint(path, checkpoint)
    if suite is None and out is None and data is None and (target is None or target.suffix != ".gguf"):
        _refuse_settings(ctx)
        session.engine.evaluate(path, which)
        return
    if suite in (None, BITS_PER_BYTE):
        suite = BITS_PER_BYTE
        _refuse_settings(ctx)
    elif suite == COMPLETION:
        _refuse_settings(ctx, "limit", "max_tokens")
    elif suite == MEMORISED:
        _refuse_settings(ctx, "limit")
    numbers, degrees = _listed("--k", ks, int), _listed("--temperature", temperatures, float)
    options = SuiteOptions(
        samples=samples or (1 if degrees == (0,) and numbers == (1,) else max(SAMPLES, *numbers)),
        ks=numbers,
        temperatures=degrees,
        limit=limit,
        max_tokens=max_tokens,
        top_p=top_p,
        seed=seed,
    )
    from nanochat_cli.evaluation.evaluate_target import evaluate_target

    evaluate_target(
        path,
        suite,
        options,
        session.reporter,
        which=which,
        out=out,
        resume=resume,
        data=data,
        backend=backend,
    )


def _refuse_settings(ctx: typer.Context, *used: str) -> None:
    """Raise ConfigError for an option, not among those `used`, that only matters where completions are drawn."""
    for parameter in ctx.command.params:
        panel = getattr(parameter, "rich_help_panel", None)
        source = ctx.get_parameter_source(parameter.name or "")
        if panel == _DRAWING and parameter.name not in used and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{parameter.opts[0]}: {'this suite draws' if used else 'bits per byte draw'} no completions; leave it "
                "out, or name a --suite that does"
            )


def _listed(option: str, text: str, kind: type[Any]) -> tuple[Any, ...]:
    """Comma-separated numbers. Raises ConfigError."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "1,5,10" if kind is int else "0.2,0.8"
        raise ConfigError(f"{option} {text}: needs numbers separated by commas, such as {example}") from None
