"""Profiles of the E3 suite: how large its runs are, and which profile this machine can run.

`presets/e3/profiles.toml` holds them. Knows tables and keys; what a key means is left to `config.load`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat_cli.bench.matched.tuning import Tuning
from nanochat_cli.config.presets import presets_folder
from nanochat_cli.config.toml import read_toml
from nanochat_cli.errors import ConfigError

PROFILES_FILE = "e3/profiles.toml"
_EVERY = "every"


@dataclass(frozen=True)
class Profile:
    """overrides: as for `--set`, laid over every preset of the suite; seeds: how many when nobody says.

    tuning: what `--tune` tries.
    """

    name: str
    description: str
    seeds: int
    overrides: tuple[str, ...]
    tuning: Tuning


def load_profiles(path: Path | None = None) -> dict[str, Profile]:
    """By name, in the order of the file. Raises ConfigError."""
    path = path or presets_folder() / PROFILES_FILE
    tables = read_toml(path, what="profiles")
    every = tables.pop(_EVERY, {})
    found = {}
    for name, table in tables.items():
        try:
            description, seeds = table["description"], table["seeds"]  # pyright: ignore[reportIndexIssue]
            changes = table.get("overrides", {})  # pyright: ignore[reportAttributeAccessIssue]
            grid = table["tuning"]  # pyright: ignore[reportIndexIssue]
            tuning = Tuning(tuple(grid["factors"]), grid["share"])  # pyright: ignore[reportArgumentType, reportIndexIssue, reportCallIssue]
        except (KeyError, TypeError):
            raise ConfigError(f"{path}: [{name}] needs description, seeds, and tuning with factors and share") from None
        found[name] = Profile(name, description, seeds, (*_overrides(every), *_overrides(changes)), tuning)
    return found


def load_profile(name: str) -> Profile:
    """Raises ConfigError for a name that does not exist."""
    profiles = load_profiles()
    if name not in profiles:
        raise ConfigError(f"--profile {name} does not exist: choose one of {', '.join(profiles)}")
    return profiles[name]


def every_run() -> tuple[str, ...]:
    """The overrides that all runs of a suite have in common, whatever their profile."""
    return _overrides(read_toml(presets_folder() / PROFILES_FILE, what="profiles")[_EVERY])


def profile_of_this_machine() -> tuple[str, str]:
    """The name of the profile to take when none was named, and why."""
    import torch

    if torch.cuda.is_available():
        return "gpu", f"this machine has a {torch.cuda.get_device_name()}"
    return "cpu", "torch finds no CUDA device here"


def _overrides(table: object) -> tuple[str, ...]:
    """A nested table as `key=value`; a JSON scalar is a TOML value."""
    assert isinstance(table, Mapping)
    return tuple(f"{key}={json.dumps(value)}" for key, value in _flatten(table, ""))


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
