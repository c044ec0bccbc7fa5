"""The data sets of a suite: prepared once when it begins, and the same for every run of it, whenever that is.

`data.json` in the folder of the suite records them. A source that grows between two runs is not read again, and a data
set that was prepared anew since is an error: runs that are compared are trained and measured on the same documents.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat_cli.config.schema import Config
from nanochat_cli.data.prepare import cached_dataset
from nanochat_cli.data.shards import ShardReader
from nanochat_cli.durable import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.formats.run.dataset import DatasetRecord, record_of
from nanochat_cli.nesting import parse_json
from nanochat_cli.report.reporter import Reporter

DATA_FILE = "data.json"


@dataclass(frozen=True)
class SuiteData:
    """What each configuration is trained on, by what it says about data; empty for a suite of before."""

    records: dict[str, DatasetRecord]

    def fix(self, config: Config) -> None:
        """Have `config` use the data set that was prepared for it, whatever its source has become."""
        if (record := self.records.get(_key(config))) is not None:
            config.data.path = Path(record.folder)


def prepare_suite_data(configs: Iterable[Config], folder: Path, reporter: Reporter) -> None:
    """Encode the corpus once, before any process does. Raises DataError for data that no run could use."""
    records: dict[str, DatasetRecord] = {}
    for config in configs:
        if _key(config) not in records:
            reader = ShardReader(cached_dataset(config, reporter), vocab_size=config.model.vocab_size)
            records[_key(config)] = record_of(reader)
    content = {key: asdict(record) for key, record in records.items()}
    write_atomically(folder / DATA_FILE, (json.dumps(content, indent=1) + "\n").encode())


def load_suite_data(folder: Path) -> SuiteData:
    """Raises DataError when the record is damaged, or a data set is no longer what it was."""
    path = folder / DATA_FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        records = {key: DatasetRecord(**values) for key, values in found.items()}
    except FileNotFoundError:
        return SuiteData({})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: no record of the data of a suite ({error}); begin a new suite") from error
    for record in records.values():
        if not record.same_content(record_of(ShardReader(Path(record.folder)))):
            raise DataError(
                f"{record.folder}: is not the data set that the suite in {folder} began with; prepare it again as it "
                "was, or begin a new suite with another --out"
            )
    return SuiteData(records)


def _key(config: Config) -> str:
    return json.dumps([config.data.model_dump_json(), config.tokenizer.model_dump_json(), config.model.vocab_size])
