"""The folder of a run that begins or continues: held by one process, with all that does not change while it trains.

No torch, so a folder that is taken is an error within milliseconds.
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat_cli import __version__
from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.json_schema import SCHEMA_FILE, json_schema
from nanochat_cli.config.load import CONFIG_FILE, config_to_toml
from nanochat_cli.config.paths import with_names_only
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import DataError
from nanochat_cli.folders import held_folder
from nanochat_cli.formats.run.find import new_run
from nanochat_cli.formats.run.origin import CHAT_TEMPLATE_FILE, read_origin
from nanochat_cli.report.environment import ENVIRONMENT_FILE, environment, read_environment
from nanochat_cli.report.reporter import Reporter

if TYPE_CHECKING:
    from nanochat_cli.data.tokenizer import Tokenizer
    from nanochat_cli.formats.run.dataset import DatasetRecord

TRAINS = "trains"
"""What the holder of a run does with it, for the message to another process."""


def run_folder(config: Config, resume: Path | None, doing: str, stem: str = "run") -> AbstractContextManager[Path]:
    """The folder of a new run, or `resume`; no other process writes into it meanwhile.

    stem: names a run that has no name, with a counter. Raises as `find.new_run` and `folders.held_folder` do.
    """
    return new_run(config.run, stem, doing) if resume is None else held_folder(resume, doing)


def create_run(
    run_dir: Path,
    config: Config,
    tokenizer: "Tokenizer",
    record: "DatasetRecord | None",
    chat_template: str | None = None,
) -> None:
    """Write configuration, environment, tokenizer, data set record and chat template. DataError if that fails."""
    from nanochat_cli.formats.run.dataset import write_record

    assert config.run.name is not None, "the caller names the run"
    described = json.dumps(environment(), indent=2, ensure_ascii=False)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(config, run_dir)
        write_atomically(run_dir / ENVIRONMENT_FILE, (described + "\n").encode())
        tokenizer.save(run_dir / "tokenizer.json")
        if record is not None:
            write_record(run_dir, record)
        if chat_template is not None:
            write_atomically(run_dir / CHAT_TEMPLATE_FILE, chat_template.encode())
    except OSError as error:
        raise DataError(f"cannot write {run_dir}: {error.strerror}; free space or choose another run.dir") from error


def write_config(config: Config, run_dir: Path) -> None:
    """Write it atomically, since a run without it could not be resumed, and its schema for editors beside it."""
    header = f"Resolved configuration of {run_dir.name}, written by nanochat {__version__}."
    text = f"#:schema {SCHEMA_FILE}\n{config_to_toml(config, header)}"  # editors read this line
    write_atomically(run_dir / CONFIG_FILE, text.encode())
    write_atomically(run_dir / SCHEMA_FILE, (json.dumps(json_schema(), ensure_ascii=False) + "\n").encode())


def provenance(run: Path, config: Config, step: int, reporter: Reporter, *, paths: bool = False) -> dict[str, object]:
    """The origin that a file exported from a run records. paths: whole ones, and not only the last name of each."""
    environment, origin = read_environment(run), read_origin(run)
    if environment is None:
        reporter.warn(f"{run}: no readable environment.json: the file will not name the commit it comes from")
    config = config if paths else with_names_only(config)
    fim = config.fim if config.fim.rate else None
    return {
        "version": __version__,
        "git": ((environment or {}).get("git") or {}).get("commit"),
        "run": run.name,
        "step": step,
        "config": config_to_toml(config),
        "origin": None if origin is None else origin.name,
        "dataset": None if origin is not None else _dataset_name(config),
        "fim.rate": fim and fim.rate,
        "fim.spm_rate": fim and fim.spm_rate,
    }


def _dataset_name(config: Config) -> str:
    return config.data.named_source if config.data.path is None else config.data.path.name
