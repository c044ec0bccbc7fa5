"""Shared by all commands: `--json`, `--quiet`, `--verbose`, and the Engine.

The three options are declared once, here, and added to every command by `cli.app`; instead of reading
them, a command asks its Session for a reporter or an engine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from nanochat_cli.errors import DataError
from nanochat_cli.training.distributed.ranks import rank

if TYPE_CHECKING:
    from nanochat_cli.engine import Engine
    from nanochat_cli.report.reporter import Reporter

_PANEL = "Every command"


@dataclass
class Session:
    """One invocation: its arguments, and what is set while they are parsed. Of several ranks rank 0 reports."""

    arguments: Sequence[str] = ()
    json_path: Path | None = None
    quiet: bool = False
    verbose: bool = False

    @cached_property
    def reporter(self) -> "Reporter":
        from nanochat_cli.report.reporter import SilentReporter, open_reporter

        return SilentReporter() if rank() else open_reporter(quiet=self.quiet)

    def silence(self) -> None:
        """Say nothing from now on, not even warnings."""
        from nanochat_cli.report.reporter import SilentReporter

        self.reporter = SilentReporter()

    @cached_property
    def engine(self) -> "Engine":
        from nanochat_cli.engine import Engine

        return Engine(self.reporter)

    def end_line(self) -> None:
        """End an unfinished line of output, so that the next message starts its own."""
        if "reporter" in vars(self):
            self.reporter.end_line()

    def write_json(self, outcome: dict[str, object]) -> None:
        """Write the command's results, updated with `outcome`, if `--json` asked for them."""
        if self.json_path is not None and rank() == 0:
            from nanochat_cli.report.reporter import write_json

            path, self.json_path = self.json_path, None
            try:
                write_json(path, {**self.reporter.results, **outcome})
            except OSError as error:
                raise DataError(f"--json {path}: cannot be written: {error.strerror}") from error


def session_of(ctx: typer.Context) -> Session:
    session = ctx.find_root().obj
    assert isinstance(session, Session)
    return session


def common_parameters() -> list[Any]:
    """The options of every command, as parameters that do not reach the command's function."""
    app = typer.Typer(add_completion=False)
    app.command()(_common)
    return get_command(app).params


def _remember_json(ctx: typer.Context, value: Path | None) -> None:
    if value is not None:
        try:
            new = not value.exists()
            value.open("a", encoding="utf-8").close()
            if new:
                value.unlink()  # until there is a result: it may be in a folder that the command reads
        except OSError as error:
            raise DataError(f"--json {value}: cannot be written: {error.strerror}") from None
        session_of(ctx).json_path = value


def _remember_quiet(ctx: typer.Context, value: bool) -> None:
    session_of(ctx).quiet = value


def _remember_verbose(ctx: typer.Context, value: bool) -> None:
    session_of(ctx).verbose = value


def _common(
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the result as JSON.",
            callback=_remember_json,
            expose_value=False,
            rich_help_panel=_PANEL,
        ),
    ] = None,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Print only warnings and the product itself.",
            callback=_remember_quiet,
            expose_value=False,
            rich_help_panel=_PANEL,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show more: speeds, and the traceback of an error.",
            callback=_remember_verbose,
            expose_value=False,
            rich_help_panel=_PANEL,
        ),
    ] = False,
) -> None:
    """Declare the options; never called."""
