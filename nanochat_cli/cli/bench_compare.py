"""`nanochat bench compare`: one report on existing runs."""

from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of


def compare(
    ctx: typer.Context,
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Finished runs, by path or name; two or more.")],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the report; default: comparisons/compare-N.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="The run to compare the others with; default: the first.")
    ] = None,
) -> None:
    """Compare finished runs: held-out bits per byte, times, memory, and what differs in their configurations.

    Runs that differ only in name, folder and seed count as seeds of one configuration: means are taken over them, and
    differences from the baseline are between runs of the same seed. Writes REPORT.md, report.html, report.json,
    plots, and hparams/ for TensorBoard. Trains nothing.
    """
    from nanochat_cli.bench.matched.compare import compare_runs
    from nanochat_cli.bench.matched.report.comparison import show_comparison, write_comparison
    from nanochat_cli.bench.matched.run_record import write_suite
    from nanochat_cli.folders import held_folder
    from nanochat_cli.formats.run.find import new_folder, require_writable

    reporter = session_of(ctx).reporter
    parent, doing = Path("comparisons"), "writes a comparison into"
    require_writable(out or parent)
    suite = compare_runs(runs, baseline)
    with new_folder(parent, "compare", doing) if out is None else held_folder(out, doing) as folder:
        written = [write_suite(folder, suite), *write_comparison(folder, suite)]
    show_comparison(suite, reporter)
    reporter.info(f"report: {folder / 'REPORT.md'}   {folder / 'report.html'}")
    reporter.result({"report": str(folder), "files": [str(path) for path in written], "notes": suite.settings["notes"]})
