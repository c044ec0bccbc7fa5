"""The data set of a run: recorded when the run begins, and compared whenever the two are used together again.

A run's figures are about *its* held-out documents in *its* tokens. A folder can be tokenised again and a source can
grow; then the two no longer match, and only this record shows it. No torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.load import CONFIG_FILE, load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.data.manifest import MANIFEST, Split
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError, NanochatError, reason
from nanochat_cli.folders import holder_of
from nanochat_cli.formats.run.find import DEFAULT_FOLDER
from nanochat_cli.formats.run.origin import read_origin
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import Reporter

RECORD_FILE = "dataset.json"
NAMED = 5
"""A message names at most so many runs."""


@dataclass(frozen=True)
class DatasetRecord:
    """folder: absolute path of the prepared data. The others are SHA-256 of the tokenizer and of each split."""

    folder: str
    tokenizer: str
    train: str
    val: str

    def same_content(self, other: "DatasetRecord") -> bool:
        """Whether both have the same tokens in both splits, wherever they are."""
        return (self.tokenizer, self.train, self.val) == (other.tokenizer, other.train, other.val)


def record_of(reader: ShardReader) -> DatasetRecord:
    """The record of a data set, from its manifest."""
    train, val = (split_fingerprint(reader, split) for split in ("train", "val"))
    return DatasetRecord(str(reader.folder.absolute()), reader.manifest.tokenizer.sha256, train, val)


def split_fingerprint(reader: ShardReader, split: Split) -> str:
    """A hash of one split, which changes when a shard does."""
    shards = reader.manifest.split(split).shards
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def write_record(run: Path, record: DatasetRecord) -> None:
    """Raises OSError."""
    write_atomically(run / RECORD_FILE, (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_record(run: Path) -> DatasetRecord | None:
    """The record of a run; None for one begun before there were records. Raises DataError for a damaged one."""
    path = run / RECORD_FILE
    try:
        return DatasetRecord(**parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not a record of a data set ({reason(error)}); remove it to go on without") from error


def open_run_data(
    run: Path, config: Config, reporter: Reporter, splits: Sequence[Split] = ("val",), *, instead: str = ""
) -> ShardReader:
    """The data set that a run was trained on, where it is now; `config` is the run's.

    splits: those that must be unchanged. instead: what a person can do if they are not. Raises DataError.
    """
    record = read_record(run)
    places = [config.data.path, None if record is None else Path(record.folder)]
    folder = next((place for place in places if place is not None and (place / MANIFEST).is_file()), None)
    reader = ShardReader(folder if folder is not None else cached_dataset(config, reporter))
    require_same_tokenizer(run, reader, instead)
    if record is None:
        if read_origin(run) is None:
            reporter.warn(
                f"{run} was begun by a version that did not record its data: {reader.folder} may have changed since"
            )
        return reader
    now = record_of(reader)
    for split, what in (("val", "held-out"), ("train", "training")):
        if split in splits and getattr(now, split) != getattr(record, split):
            raise DataError(
                f"{reader.folder}: its {what} documents are not those that {run} began with (they were prepared "
                f"again, or their source has changed); restore them{instead}"
            )
    return reader


def require_same_tokenizer(run: Path, reader: ShardReader, instead: str = "") -> None:
    """Raise DataError if the data set's tokenizer is not the run's: its tokens would mean something else."""
    path = run / "tokenizer.json"
    if Tokenizer.load(path).to_str() != reader.tokenizer.to_str():
        raise DataError(
            f"{reader.folder} has a different tokenizer from {path}, so its tokens mean something else to that model; "
            f"prepare it again with --tokenizer {path}{instead}"
        )


def require_replaceable(dataset: Path, changed: str, *, force: bool) -> None:
    """Raise ConfigError if a data set must not be replaced: without force, and even with it while a run uses it."""
    using = runs_using(dataset)
    training = [f"{holder} {run}" for run in using if (holder := holder_of(run)) is not None]
    if training:
        raise ConfigError(f"{dataset}: {training[0]} on it; wait until it ends, or choose another --out")
    if force:
        return
    named = ", ".join(str(run) for run in using[:NAMED]) + (f" and {len(using) - NAMED} more" * (len(using) > NAMED))
    reason = f"{named} could no longer be measured or resumed" if using else f"no run in {DEFAULT_FOLDER}/ uses it"
    raise ConfigError(
        f"{dataset}: another data set is here ({changed} changed); choose another --out, or replace it with --force: "
        f"{reason}"
    )


def runs_using(dataset: Path) -> list[Path]:
    """The runs in ./runs, including those of suites, that were trained on the data set in a folder."""
    folders = [path.parent for pattern in ("*", "*/runs/*") for path in DEFAULT_FOLDER.glob(f"{pattern}/{CONFIG_FILE}")]
    return sorted(run for run in folders if _dataset_of(run) == dataset.resolve())


def _dataset_of(run: Path) -> Path | None:
    try:
        record, path = read_record(run), load_run_config(run).data.path
    except NanochatError:  # what is wrong with that run does not matter here
        return None
    folder = record.folder if record is not None else path
    return None if folder is None else Path(folder).resolve()
