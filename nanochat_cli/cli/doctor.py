"""`nanochat doctor`: what this machine has, to explain why something is slow or missing, and for bug reports."""

from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False)


@app.command()
def doctor(
    ctx: typer.Context,
    plain: Annotated[bool, typer.Option("--plain", help="Only a block of text to paste into a bug report.")] = False,
) -> None:
    """Show versions, devices, compilers, optional parts, memory and disk, without names of people and folders.

    The exit code is 0 whatever it finds. `nanochat validate` checks that what is installed computes correctly.
    """
    from nanochat_cli.diagnose.doctor import diagnose

    reporter = session_of(ctx).reporter
    diagnosis = diagnose()
    reporter.result(diagnosis.as_dict())
    if plain:
        reporter.write(diagnosis.text())
        return
    for heading, facts in diagnosis.sections.items():
        reporter.table(heading, ("what", "found", "to do"), [(f.name, f.value, f.advice) for f in facts])
    columns = ("part", "found", "what it is for", "how to get it")
    rows = [(p.name, p.version or "not here", p.unlocks, "" if p.version else p.install) for p in diagnosis.optional]
    reporter.table("optional parts", columns, rows)
    reporter.info("for a bug report: nanochat doctor --plain")
