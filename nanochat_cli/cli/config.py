"""`nanochat config schema`: the keys of a configuration file, for editors."""

import json
from pathlib import Path
from typing import Annotated

import typer

from nanochat_cli.cli.session import session_of

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def config() -> None:
    """Help editors to complete and check configuration files."""


@app.command()
def schema(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: standard output.")] = None,
) -> None:
    """Print the JSON schema of the files that --config takes.

    Editors that know TOML, such as VS Code with Even Better TOML, find it by the first line of a file: #:schema FILE.
    """
    from nanochat_cli.atomic_write import write_atomically
    from nanochat_cli.config.json_schema import json_schema
    from nanochat_cli.errors import DataError

    reporter = session_of(ctx).reporter
    found = json_schema()
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    reporter.result({"schema": found})
    if out is None:
        reporter.write(text)
        return
    try:
        write_atomically(out, text.encode())
    except OSError as error:
        raise DataError(f"--out {out}: {error.strerror}") from error
    reporter.info(f"wrote {out}; an editor finds it by a first line: #:schema {out.name}")
