"""`nanochat grpo`: learn from rewards."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nanochat_cli.cli.options import Overrides
from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import ConfigError

if TYPE_CHECKING:
    from nanochat_cli.config.schema import Config

app = typer.Typer(add_completion=False)


@app.command()
def grpo(
    ctx: typer.Context,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="The run to start from, with --resume to continue; default: the latest."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="Problems to practise: python, rust, or a file of them.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(metavar="MODE", help="training-free: show experiences; policy: GRPO; rft: fine-tune on answers."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(metavar="N", help="Rounds of rollouts; with --resume: total.")] = None,
    group: Annotated[int | None, typer.Option(metavar="G", help="Rollouts per problem in a round.")] = None,
    lessons: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint that writes lessons (training-free).")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="RUN2", help="Folder of the new run.")] = None,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a run of this command after its last round.")
    ] = False,
) -> None:
    """Let a run practise problems that a sandbox judges; the result is a new run with a report of before and after."""
    from nanochat_cli.config.load import run_config
    from nanochat_cli.formats.run.find import find_run, require_writable
    from nanochat_cli.rl.learn import learn_from_rewards

    session = session_of(ctx)
    source = find_run(run)
    fixed = {"--task": {"grpo.task": task}, "--mode": {"grpo.mode": mode}, "--group": {"grpo.group": group}}
    fixed["--lessons"] = {"grpo.lessons_url": lessons}
    options = {**fixed, "--rounds": {"grpo.rounds": rounds}}
    config = run_config(source, overrides, options, session.reporter.warn)
    if resume:
        given = [option for option, values in fixed.items() if None not in values.values()]
        _require_continuation(source, config, [*given, *(["--out"] if out is not None else [])])
        require_writable(source)
        learn_from_rewards(config, source, session.reporter)
        return
    config.grpo.source = source
    stem = _place(config, source, out)
    learn_from_rewards(config, None, session.reporter, stem)


def _require_continuation(run: Path, config: "Config", given: list[str]) -> None:
    """Raise ConfigError for options that a begun run cannot change, and for a run of another command."""
    from nanochat_cli.config.load import load_run_config
    from nanochat_cli.config.paths import anchor

    if given:
        raise ConfigError(f"{given[0]} does not go with --resume: a run keeps its own; --rounds and --set may be given")
    begun = load_run_config(run)
    if begun.grpo.source is None:
        raise ConfigError(f"{run}: not a run of nanochat grpo; leave out --resume to start one from it")
    anchor(begun)
    anchor(config)
    for key in ("source", "task", "mode", "limit", "max_level", "held_out", "eval_samples", "library"):
        if getattr(begun.grpo, key) != getattr(config.grpo, key):
            raise ConfigError(
                f"--set grpo.{key}: {run} began with {key} = {getattr(begun.grpo, key)}; start a new run to change it"
            )


def _place(config: "Config", source: Path, out: Path | None) -> str:
    """Set the new run's folder, by default one beside its source; returns the stem for a run without a name."""
    from nanochat_cli.formats.run.find import require_free, require_writable

    stem = f"{source.name}-{config.grpo.mode}"
    config.run.dir, config.run.name = (source.parent, None) if out is None else (out.parent, out.name)
    require_free(config.run)
    require_writable(config.run.dir / (config.run.name or stem))
    return stem
