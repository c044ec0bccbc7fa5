"""The data sets of a suite: prepared once at its start, and the same for every run, however much later.

`data.json` in the folder of the suite records them. A source that grows between two runs is not read again, and a data
set that has since been prepared again is an error: compared runs must be trained and measured on the same documents.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.errors import DataError, reason
from nanochat_cli.formats.run.dataset import DatasetRecord, record_of
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import Reporter

DATA_FILE = "data.json"


@dataclass(frozen=True)
class SuiteData:
    """The data set of each configuration, by its settings for data; empty for a suite of an older version."""

    records: dict[str, DatasetRecord]

    def fix(self, config: Config) -> None:
        """Point `config` to the data set that was prepared for it, even if its source has changed since."""
        for key, record in self.records.items():
            if _is_of(key, config):
                config.data.path = Path(record.folder)
                return


def prepare_suite_data(configs: Iterable[Config], folder: Path, reporter: Reporter) -> None:
    """Encode the corpus once, before any run starts. Raises DataError for unusable data."""
    records: dict[str, DatasetRecord] = {}
    for config in configs:
        if _key(config) not in records:
            reader = ShardReader(cached_dataset(config, reporter), vocab_size=config.model.vocab_size)
            records[_key(config)] = record_of(reader)
    content = {key: asdict(record) for key, record in records.items()}
    write_atomically(folder / DATA_FILE, (json.dumps(content, indent=1) + "\n").encode())


def load_suite_data(folder: Path) -> SuiteData:
    """Raises DataError if the record is damaged or a data set has changed."""
    path = folder / DATA_FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        records = {key: DatasetRecord(**values) for key, values in found.items()}
    except FileNotFoundError:
        return SuiteData({})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the record of a suite's data ({reason(error)}); begin a new suite") from error
    for record in records.values():
        if not record.same_content(record_of(ShardReader(Path(record.folder)))):
            raise DataError(
                f"{record.folder}: no longer the data set with which the suite in {folder} began; prepare it again as "
                "it was, or begin a new suite with another --out"
            )
    return SuiteData(records)


def _key(config: Config) -> str:
    return json.dumps([config.data.model_dump_json(), config.tokenizer.model_dump_json(), config.model.vocab_size])


def _is_of(key: str, config: Config) -> bool:
    """Whether a record is that of `config`; one of an older version lacks the keys that came since."""
    data, tokenizer, vocab_size = json.loads(key)
    sections = ((data, config.data), (tokenizer, config.tokenizer))
    return vocab_size == config.model.vocab_size and all(
        json.loads(then).items() <= json.loads(now.model_dump_json()).items() for then, now in sections
    )
