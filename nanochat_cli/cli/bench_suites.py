"""`nanochat bench e3` and `nanochat bench ab`: matched training runs and their report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from nanochat_cli.cli.options import Overrides
from nanochat_cli.cli.session import Session, session_of
from nanochat_cli.errors import ConfigError

if TYPE_CHECKING:
    from nanochat_cli.bench.matched.plan import Plan

MatchName = Literal["steps", "tokens", "time"]
"""As `bench.matched.plan.Match`."""

Seeds = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Runs per configuration, each with its own data order.")
]
MatchOption = Annotated[
    MatchName | None,
    typer.Option(help="What runs share: optimizer steps, tokens or training time; default: what bounds the baseline."),
]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the suite; default: the next in ./runs.")]
Report = Annotated[Path | None, typer.Option(metavar="DIR", help="Copy the report there, without the runs.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a suite; finished runs are not repeated.")]


def e3(
    ctx: typer.Context,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="smoke, cpu, gpu or full; default: what this machine can run.")
    ] = None,
    configs: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Configurations besides the baseline; default: the five published ones, and best."
        ),
    ] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Also each method alone.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="First choose each one's learning rate, all from the same few.")
    ] = False,
    seeds: Seeds = None,
    match: MatchOption = None,
    overrides: Overrides = [],  # noqa: B006 - Typer copies it
    resume: Resume = False,
    out: Out = None,
    report: Report = None,
) -> None:
    """Train the E3 configurations on the same data, and test what is claimed for them.

    Each run is an ordinary run in its own process; one seed's runs follow each other. A run that diverges, fails or
    does not fit into memory is a row of the report. After Ctrl-C, continue with --resume.
    """
    from nanochat_cli.bench.matched.plan import plan_e3
    from nanochat_cli.bench.matched.profiles import load_profile, profile_of_this_machine

    session = session_of(ctx)

    def plan(name: str | None) -> "Plan":
        if name is None:
            name, why = profile_of_this_machine()
            session.reporter.info(f"profile {name}: {why}")
        chosen = load_profile(name)
        return plan_e3(
            profile=chosen.name,
            profile_overrides=chosen.overrides,
            configs=None if configs is None else [part.strip() for part in configs.split(",") if part.strip()],
            ablations=ablations,
            seeds=seeds or chosen.seeds,
            match=match or "steps",
            given=overrides,
            tuning=chosen.tuning if tune else None,
        )

    if not resume:
        _begin(session, plan(profile), out, report)
        return
    from nanochat_cli.bench.matched.suite import find_folder, resume_suite

    folder = find_folder("e3", out)
    if profile or configs or ablations or tune or seeds or match or overrides:
        _require_same(folder, plan(profile))
    resume_suite(folder, session.reporter, report)


def ab(
    ctx: typer.Context,
    base: Annotated[list[str], typer.Option("--base", metavar="PRESET", help="What both sides share.")] = [],  # noqa: B006
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="KEY=VALUE", help="A variant of the base, 'K1=V1 K2=V2' too; may be repeated."),
    ] = [],  # noqa: B006
    seeds: Seeds = None,
    match: MatchOption = None,
    overrides: Overrides = [],  # noqa: B006
    resume: Resume = False,
    out: Out = None,
    report: Report = None,
) -> None:
    """Train a base and variants with a key or a few changed, on the same data, and compare them.

    Runs, measures and report are as in bench e3; the default is three seeds.
    """
    from nanochat_cli.bench.matched.plan import natural_match, plan_ab
    from nanochat_cli.bench.matched.profiles import every_run
    from nanochat_cli.config.load import with_default_model

    session = session_of(ctx)

    def plan() -> "Plan":
        if not base:
            raise ConfigError("--base is missing: name the preset that both sides share, such as --base quickstart")
        whole = with_default_model(base, None, "quickstart")
        return plan_ab(
            base=whole,
            vary=vary,
            overrides=every_run(),
            seeds=seeds or 3,
            match=match or natural_match(whole, (*every_run(), *overrides)),
            given=overrides,
        )

    if not resume:
        _begin(session, plan(), out, report)
        return
    from nanochat_cli.bench.matched.suite import find_folder, resume_suite

    folder = find_folder("ab", out)
    if base or vary or seeds or match or overrides:
        _require_same(folder, plan())
    resume_suite(folder, session.reporter, report)


def _begin(session: Session, plan: "Plan", out: Path | None, report: Path | None) -> None:
    from nanochat_cli.bench.matched.suite import begin_suite

    begin_suite(plan, out, session.reporter, report)


def _require_same(folder: Path, plan: "Plan") -> None:
    """Raise ConfigError when the options describe a different suite from the one to continue."""
    from nanochat_cli.bench.matched.plan import PLAN_FILE, load_plan

    if load_plan(folder) != plan:
        raise ConfigError(f"--resume: {folder / PLAN_FILE} has other options; leave them out, or choose another --out")
