"""Options that several commands share: which configuration, which run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import typer

from nanochat_cli.errors import ConfigError

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
Checkpoint = Annotated[
    str | None,
    typer.Option("--checkpoint", metavar="best|latest|STEP", help="Which checkpoint of the run; default: latest."),
]

BackendName = Literal["reference", "cpu", "triton"]
"""As `nanochat_kernels.backends.Backend`, which would import torch."""
Backend = Annotated[
    BackendName | None,
    typer.Option(
        "--backend", help="Which kernels compute; default: NANOCHAT_BACKEND, else the fastest for the device."
    ),
]


def require_known_backend() -> None:
    """Raise ConfigError for an unknown NANOCHAT_BACKEND, before anything that reads it is imported."""
    name = os.environ.get("NANOCHAT_BACKEND")
    if name and name not in get_args(BackendName):
        raise ConfigError(f"NANOCHAT_BACKEND = {name} does not exist: choose one of {', '.join(get_args(BackendName))}")


def resolve(
    session: "Session",
    presets: Sequence[str],
    file: Path | None,
    overrides: Sequence[str],
    *,
    default_preset: str,
    options: Mapping[str, Mapping[str, object]] | None = None,
) -> "Config":
    """The configuration of the options, based on `default_preset` if they name no model; warns of unused keys.

    options: option -> {key: value}, as in `config.load.resolve_config`.
    """
    from nanochat_cli.config.load import resolve_config, with_default_model
    from nanochat_cli.formats.initial import initial_shape, place_of

    named, presets = presets, with_default_model(presets, file, default_preset)
    if len(presets) > len(named) and (named or file is not None):
        session.reporter.info(f"no preset names a model: starting from {default_preset}")
    reporter = session.reporter
    config = resolve_config(presets, file, overrides, options or {}, reporter.warn, reporter.info, initial_shape)
    if config.train.init is not None:
        config.train.init = place_of(config.train.init)
    return config
