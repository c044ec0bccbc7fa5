"""`nanochat verify`: are these files still what was exported or saved?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of
from nanochat_cli.errors import DataError, ValidationFailure

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    ctx: typer.Context,
    target: Annotated[
        Path | None,
        typer.Argument(metavar="PATH", help="A .gguf file, a Hugging Face folder, or a run; default: the latest run."),
    ] = None,
) -> None:
    """Compare a GGUF file, a Hugging Face folder or a run's checkpoints with the checksums they were written with.

    Exit code 4 when one does not match. A file without a checksum is named, which is not a failure.
    """
    from nanochat_cli.diagnose.integrity import check_integrity
    from nanochat_cli.formats.run.find import latest_run

    reporter = session_of(ctx).reporter
    target = latest_run() if target is None else target
    findings = list(check_integrity(target))
    if not findings:
        raise DataError(f"{target}: nothing is saved in it yet")
    reporter.result({"findings": [{**asdict(one), "path": str(one.path)} for one in findings]})
    for one in findings:
        if one.state == "unknown":
            reporter.warn(f"{one.path}: cannot tell: {one.detail}")
        else:
            reporter.info(f"{one.path}: {one.state}: {one.detail}")
    damaged = [str(one.path) for one in findings if one.state == "damaged"]
    if damaged:
        raise ValidationFailure(
            f"{', '.join(damaged)}: not what was written; do not use it: export, copy or download it again"
        )
