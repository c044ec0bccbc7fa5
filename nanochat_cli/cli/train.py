"""`nanochat train`: start a run, or continue one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from nanochat_cli.cli.options import ConfigFile, Overrides, Presets, resolve
from nanochat_cli.cli.session import Session, session_of
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.training.distributed.ranks import is_launched, rank, require_shareable, world_size

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config

app = typer.Typer(add_completion=False)
AUTO = Path("auto")


@app.command()
def train(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="With --resume: the run to continue; default: the latest. auto: the one of that name, or begin it.",
        ),
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
    nproc: Annotated[
        int, typer.Option("--nproc", metavar="N", min=1, help="Train with so many processes on this machine.")
    ] = 1,
) -> None:
    """Train a ternary model: by default the quickstart preset, on the embedded corpus."""
    session = session_of(ctx)
    launches = nproc > 1 and not is_launched()
    if launches:
        session.silence()  # the ranks will say it
    begun, stem = None, "run"
    if resume and run != AUTO:
        target = run if run is not None or name is None else Path(name)
        begun, resolved = _to_resume(session, target, bool(preset or config), overrides)
    elif run is not None and not resume:
        raise ConfigError(f"{run}: a run is only named with --resume; did you mean --name or --preset {run}?")
    else:
        named = {"--name": {"run.name": name}}
        resolved = resolve(session, preset, config, overrides, default_preset="quickstart", options=named)
        resolved.grpo.source = None  # --config may name the configuration of a run of nanochat grpo
        stem = _stem(preset, config)
        if resume:
            begun, resolved = _begun(session, resolved, overrides)
    require_shareable(resolved, nproc if launches else world_size())
    if begun is None and rank() == 0:  # which may have claimed it already
        require_startable(resolved, stem)
    _require_events(resolved, tensorboard)
    if launches:
        _launch(session, nproc)
    session.engine.train(resolved, begun, stem, show=tensorboard)


def _launch(session: Session, nproc: int) -> NoReturn:
    from nanochat_cli.training.distributed.launch import become_launcher

    become_launcher(nproc, session.arguments)


def require_startable(config: "Config", stem: str) -> None:
    """Raise ConfigError or DataError, within milliseconds, if the run's place is taken or it has no data."""
    from nanochat_cli.formats.run.find import require_free, require_writable

    require_free(config.run)
    require_writable(config.run.dir / (config.run.name or stem))
    _require_data(config, begins=True)


def _require_data(config: "Config", *, begins: bool = False) -> None:
    from nanochat_cli.data.conversation_rules import require_combinable
    from nanochat_cli.formats.run.find import source_runs

    source_runs(config, begins=begins)
    for key, path in (("data.path", config.data.path), ("data.base", config.data.base)):
        if path is not None and not (path / "manifest.json").is_file():
            reason = "it has no manifest.json; write one with nanochat tokenize" if path.is_dir() else "no such folder"
            raise DataError(f"{key} = {path}: not a data set: {reason}")
    path = config.data.path
    require_combinable(config, chats=config.data.chat if path is None else _holds_conversations(path))


def _holds_conversations(path: Path) -> bool:
    """What a manifest says; one that is damaged is refused with its reason when the data set is opened."""
    from nanochat_cli.data.manifest import read_manifest

    try:
        return read_manifest(path).chat is not None
    except DataError:
        return False


def _require_events(config: "Config", tensorboard: bool) -> None:
    if tensorboard and not config.telemetry.tensorboard:
        raise ConfigError("--tensorboard has nothing to show with telemetry.tensorboard = false: leave one of them out")


def _begun(session: Session, config: "Config", overrides: list[str]) -> tuple[Path | None, "Config"]:
    """What a command that is repeated until it succeeds goes on with: its run, once that has a checkpoint."""
    from nanochat_cli.config.load import CONFIG_FILE
    from nanochat_cli.config.paths import anchor

    if config.run.name is None:
        raise ConfigError("--resume auto: which run? Name it with --name")
    run = config.run.dir / config.run.name
    if not (run / CONFIG_FILE).is_file():
        return None, config
    if not (run / "checkpoints" / "latest").is_file():
        return run, config
    run, begun = _to_resume(session, run, False, overrides)
    anchor(begun)  # as it was when the same options began it
    return run, begun


def _to_resume(
    session: Session, target: Path | None, other_config: bool, overrides: list[str]
) -> tuple[Path, "Config"]:
    """The folder of the run, and the configuration to go on with."""
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
    return run, config


def _stem(presets: list[str], config: Path | None) -> str:
    """Stem of the run's name: the first model preset, else the file, else quickstart."""
    from nanochat_cli.config.presets import load

    models = [name for name in presets if not load(name).is_overlay]
    if models:
        return Path(models[0]).stem
    return config.stem if config is not None else "quickstart"
