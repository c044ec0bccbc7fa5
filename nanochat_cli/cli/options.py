"""Options that several commands take: which configuration, which run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from nanochat_cli.cli.session import Session
    from nanochat_cli.config.schema import Config


def _complete_preset(incomplete: str) -> list[str]:
    from nanochat_cli.config.presets import names

    return [name for name in names() if name.startswith(incomplete)]


Presets = Annotated[
    list[str],
    typer.Option(
        "--preset",
        metavar="NAME",
        help="A preset; several compose left to right.",
        autocompletion=_complete_preset,
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="A TOML file, applied after the presets.")
]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="One key, applied last, e.g. train.total_steps=100.")
]
Run = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="A run, by path or name; default: the latest in ./runs.")
]


def resolve(
    session: "Session",
    presets: Sequence[str],
    file: Path | None,
    overrides: Sequence[str],
    *,
    default_preset: str,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> "Config":
    """The configuration that the options ask for; `default_preset` when they name neither preset nor file.

    options: option -> {key: value}, as in `config.load.resolve_config`.
    """
    from nanochat_cli.config.load import resolve_config

    if not presets and file is None:
        presets = [default_preset]
    return resolve_config(presets, file, overrides, session.reporter.warn, options or {})
