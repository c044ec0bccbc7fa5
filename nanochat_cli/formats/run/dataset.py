"""The data that a run belongs to: recorded when it begins, and compared whenever the two meet again.

A figure of a run is one of *its* held-out documents in *its* tokens. A folder can be tokenised anew and a source can
grow; then the two no longer fit, and nothing but this record tells. No torch.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.load import CONFIG_FILE, load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import MANIFEST, ShardReader, Split
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import ConfigError, DataError, NanochatError
from nanochat_cli.folders import holder_of
from nanochat_cli.formats.run.find import DEFAULT_FOLDER
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import Reporter

RECORD_FILE = "dataset.json"
NAMED = 5
"""Runs that a message names at most."""


@dataclass(frozen=True)
class DatasetRecord:
    """folder: absolute, of the prepared data. The others are SHA-256 of what a split or the tokenizer consists of."""

    folder: str
    tokenizer: str
    train: str
    val: str

    def same_content(self, other: "DatasetRecord") -> bool:
        """Whether both have the same tokens in both splits, wherever they lie."""
        return (self.tokenizer, self.train, self.val) == (other.tokenizer, other.train, other.val)


def record_of(reader: ShardReader) -> DatasetRecord:
    """What a data set is, from its manifest."""
    train, val = (split_fingerprint(reader, split) for split in ("train", "val"))
    return DatasetRecord(str(reader.folder.absolute()), reader.manifest.tokenizer.sha256, train, val)


def split_fingerprint(reader: ShardReader, split: Split) -> str:
    """Of one split: it changes when a shard does."""
    shards = reader.manifest.split(split).shards
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def write_record(run: Path, record: DatasetRecord) -> None:
    """Raises OSError."""
    write_atomically(run / RECORD_FILE, (json.dumps(asdict(record), indent=2) + "\n").encode())


def read_record(run: Path) -> DatasetRecord | None:
    """None of a run that was begun before there were records. Raises DataError for a damaged one."""
    path = run / RECORD_FILE
    try:
        return DatasetRecord(**parse_json(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: no record of a data set ({error}); remove it to go on without") from error


def open_run_data(
    run: Path, config: Config, reporter: Reporter, splits: Sequence[Split] = ("val",), *, instead: str = ""
) -> ShardReader:
    """The data set that a run was trained on, where it lies now; `config` is that of the run.

    splits: those that have to be what they were. instead: what a person can do where they are not. Raises DataError.
    """
    record = read_record(run)
    places = [config.data.path, None if record is None else Path(record.folder)]
    folder = next((place for place in places if place is not None and (place / MANIFEST).is_file()), None)
    reader = ShardReader(folder if folder is not None else cached_dataset(config, reporter))
    require_same_tokenizer(run, reader, instead)
    if record is None:
        reporter.warn(
            f"{run} was begun by a version that did not record its data: nothing tells whether {reader.folder} has "
            "changed since"
        )
        return reader
    found = record_of(reader)
    for split, what in (("val", "held-out"), ("train", "training")):
        if split in splits and getattr(found, split) != getattr(record, split):
            raise DataError(
                f"{reader.folder}: its {what} documents are not those that {run} began with (it was prepared anew, "
                f"or its source has changed); prepare it again as it was{instead}"
            )
    return reader


def require_same_tokenizer(run: Path, reader: ShardReader, instead: str = "") -> None:
    """Raise DataError when the data set was tokenised otherwise than the run: its tokens mean something else."""
    path = run / "tokenizer.json"
    if Tokenizer.load(path).to_str() != reader.tokenizer.to_str():
        raise DataError(
            f"{reader.folder} has another tokenizer than {path}, so its tokens mean something else to that model; "
            f"prepare it again with --tokenizer {path}{instead}"
        )


def require_replaceable(dataset: Path, changed: str, *, force: bool) -> None:
    """Raise ConfigError when a data set must not be replaced: without force, and with it while a run trains on it."""
    using = runs_using(dataset)
    training = [f"{run} ({holder})" for run in using if (holder := holder_of(run)) is not None]
    if training:
        raise ConfigError(f"{dataset}: {training[0]} on it; wait for its end, or choose another --out")
    if force:
        return
    named = ", ".join(str(run) for run in using[:NAMED]) + (f" and {len(using) - NAMED} more" * (len(using) > NAMED))
    reason = f"{named} could no longer be measured or resumed" if using else f"no run in {DEFAULT_FOLDER}/ uses it"
    raise ConfigError(
        f"{dataset}: another data set is here ({changed} changed); choose another --out, or replace it with --force: "
        f"{reason}"
    )


def runs_using(dataset: Path) -> list[Path]:
    """The runs in ./runs, those of suites too, that were trained on the data set in a folder."""
    folders = [path.parent for pattern in ("*", "*/runs/*") for path in DEFAULT_FOLDER.glob(f"{pattern}/{CONFIG_FILE}")]
    return sorted(run for run in folders if _dataset_of(run) == dataset.resolve())


def _dataset_of(run: Path) -> Path | None:
    try:
        record, path = read_record(run), load_run_config(run).data.path
    except NanochatError:  # whatever is wrong with that run, it is not what was asked for
        return None
    found = record.folder if record is not None else path
    return None if found is None else Path(found).resolve()
