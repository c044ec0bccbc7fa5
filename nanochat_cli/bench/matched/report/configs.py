"""The settings of compared runs, and where they differ.

Knows run folders and dotted keys. The name, folder and seed of a run do not count as settings here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.report.tables import NONE, Table, plain_value
from nanochat_cli.bench.matched.run_record import RunRecord, Suite
from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import load_run_config
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import NanochatError

Settings = dict[str, Any]


def settings_of(config: Config) -> Settings:
    """Dotted key -> plain value, for everything but `run.*`."""
    settings: Settings = {}
    plain = config.model_dump(mode="json")
    for key in leaves():
        if not key.startswith("run."):
            value: Any = plain
            for part in key.split("."):
                value = value[part]
            settings[key] = value
    return settings


def read_settings(suite: Suite, folder: Path) -> dict[str, Settings]:
    """The settings of every run with a readable configuration, by the folder that its record names.

    folder: the suite's; a run's folder is looked up there, then in the working folder.
    """
    return {run.run: settings for run in suite.runs if (settings := _read(run, folder)) is not None}


def differing_keys(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ, in the order of the schema."""
    known = list(settings)
    return [key for key in (known[0] if known else ()) if any(other[key] != known[0][key] for other in known[1:])]


def differences_table(suite: Suite, settings: Mapping[str, Settings]) -> Table:
    """One row per differing key, one column per configuration; several values where its seeds differ."""
    by_config = {
        config: [settings[run.run] for run in suite.of(config) if run.run in settings] for config in suite.configs
    }
    rows = []
    for key in differing_keys(settings.values()):
        cells = [dict.fromkeys(plain_value(run[key]) for run in runs) for runs in by_config.values()]
        rows.append([key, *(" | ".join(values) or NONE for values in cells)])
    return Table(["key", *by_config], rows)


def _read(run: RunRecord, folder: Path) -> Settings | None:
    for place in (folder / run.run, Path(run.run)):
        try:
            return settings_of(load_run_config(place))
        except NanochatError:
            continue
    return None
