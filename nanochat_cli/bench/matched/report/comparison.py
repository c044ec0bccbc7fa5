"""The report of matched runs: `REPORT.md`, `report.html`, pictures and TensorBoard's HParams; and its tables on screen.

Knows the order in which these are made. What they say is in `notes`, `sections` and `tables`.
"""

from pathlib import Path

from nanochat_cli.bench.matched.report.configs import read_settings
from nanochat_cli.bench.matched.report.hparams import write_hparams
from nanochat_cli.bench.matched.report.notes import notes_of
from nanochat_cli.bench.matched.report.pages import html, markdown
from nanochat_cli.bench.matched.report.plots import write_pictures
from nanochat_cli.bench.matched.report.sections import sections_of, title_of
from nanochat_cli.bench.matched.report.summary import summarise_configs
from nanochat_cli.bench.matched.report.tables import Table, claims_table, runs_table, step_table, unfinished_table
from nanochat_cli.bench.matched.run_record import Suite, write_text
from nanochat_cli.report.reporter import Reporter


def write_comparison(folder: Path, suite: Suite) -> list[Path]:
    """Writes REPORT.md, report.html, the PNG files and `hparams/` into `folder`; returns the files of the report.

    Configurations are read from the runs' folders, as far as these exist. Raises DataError.
    """
    settings, summaries = read_settings(suite, folder), summarise_configs(suite)
    pictures = write_pictures(folder, suite, summaries)
    write_hparams(folder, suite, settings)
    title, notes = title_of(suite), notes_of(suite, summaries)
    sections = sections_of(suite, summaries, settings, pictures)
    pages = [
        write_text(folder / "REPORT.md", markdown(title, notes, sections, folder)),
        write_text(folder / "report.html", html(title, notes, sections)),
    ]
    return [*pages, *pictures.values()]


def show_comparison(suite: Suite, reporter: Reporter) -> None:
    """Tables of runs, times and claims, and a warning for every note."""
    summaries = summarise_configs(suite)
    _show(reporter, title_of(suite), runs_table(summaries, short=True))
    if len((step := step_table(summaries)).columns) > 1:
        _show(reporter, "time of a step, means over seeds", step)
    if suite.claims:
        _show(reporter, "claims", claims_table(suite.claims, short=True))
    if (unfinished := unfinished_table(suite)).rows:
        _show(reporter, "runs that did not finish", unfinished)
    for note in notes_of(suite, summaries):
        reporter.warn(note)


def _show(reporter: Reporter, title: str, table: Table) -> None:
    reporter.table(title, table.columns, table.rows)
