"""`nanochat train`: start a run, or continue one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import Session, session_of
from nanochat_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config

app = typer.Typer(add_completion=False)


@app.command()
def train(
    ctx: typer.Context,
    run: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="With --resume: the run to continue; default: the latest.")
    ] = None,
    preset: Presets = [],  # noqa: B006 - Typer copies it
    config: ConfigFile = None,
    overrides: Overrides = [],  # noqa: B006
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the run; default: the preset's name and a counter.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run from its last checkpoint.")] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Serve TensorBoard on this machine while it trains.")
    ] = False,
) -> None:
    """Train a ternary model: by default the quickstart preset, on the embedded corpus."""
    session = session_of(ctx)
    if resume:
        target = run if run is not None or name is None else Path(name)
        _resume(session, target, bool(preset or config), overrides, tensorboard)
        return
    if run is not None:
        raise ConfigError(f"{run}: a run is only named with --resume; did you mean --name or --preset {run}?")
    resolved = resolve(
        session, preset, config, overrides, default_preset="quickstart", options={"--name": {"run.name": name}}
    )
    resolved.grpo.source = None  # --config may name the configuration of a run of nanochat grpo
    stem = _stem(preset, config)
    require_startable(resolved, stem)
    _require_events(resolved, tensorboard)
    session.engine.train(resolved, None, stem, show=tensorboard)


def require_startable(config: "Config", stem: str) -> None:
    """Raise ConfigError or DataError, within milliseconds, if the run's place is taken or it has no data."""
    from nanochat_cli.formats.run.find import require_free, require_writable

    require_free(config.run)
    require_writable(config.run.dir / (config.run.name or stem))
    _require_data(config)


def _require_data(config: "Config") -> None:
    path = config.data.path
    if path is not None and not (path / "manifest.json").is_file():
        reason = "it has no manifest.json; write one with nanochat tokenize" if path.is_dir() else "no such folder"
        raise DataError(f"data.path = {path}: not a data set: {reason}")


def _require_events(config: "Config", tensorboard: bool) -> None:
    if tensorboard and not config.telemetry.tensorboard:
        raise ConfigError("--tensorboard has nothing to show with telemetry.tensorboard = false: leave one of them out")


def _resume(session: Session, target: Path | None, other_config: bool, overrides: list[str], tensorboard: bool) -> None:
    from nanochat_cli.config.load import CONFIG_FILE, run_config
    from nanochat_cli.formats.run.find import find_run, require_writable

    run = find_run(target)
    if other_config:
        session.reporter.warn(f"--resume continues {run} with its own {CONFIG_FILE}; --preset and --config are ignored")
    config = run_config(run, overrides, warn=session.reporter.warn)
    if config.grpo.source is not None:
        raise ConfigError(f"{run}: a run of nanochat grpo; continue it with: nanochat grpo --resume {run}")
    require_writable(run)
    _require_data(config)
    _require_events(config, tensorboard)
    session.engine.train(config, resume=run, show=tensorboard)


def _stem(presets: list[str], config: Path | None) -> str:
    """Stem of the run's name: the first model preset, else the file, else quickstart."""
    from nanochat_cli.config.presets import load

    models = [name for name in presets if not load(name).is_overlay]
    if models:
        return Path(models[0]).stem
    return config.stem if config is not None else "quickstart"
