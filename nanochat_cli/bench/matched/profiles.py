"""Profiles of the E3 suite: how large its runs are, and which profile suits this machine.

`presets/e3/profiles.toml` holds them. Knows tables and keys; what a key means is left to `config.load`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.tuning import Tuning
from nanochat_cli.config.presets import presets_folder
from nanochat_cli.config.toml import read_toml
from nanochat_cli.errors import ConfigError

PROFILES_FILE = "e3/profiles.toml"
_EVERY = "every"


@dataclass(frozen=True)
class Profile:
    """overrides: as for `--set`, applied to every preset of the suite; seeds: the default number.

    tuning: what `--tune` tries.
    """

    name: str
    description: str
    seeds: int
    overrides: tuple[str, ...]
    tuning: Tuning


def load_profiles(path: Path | None = None) -> dict[str, Profile]:
    """All profiles by name, in the order of the file. Raises ConfigError."""
    path = path or presets_folder() / PROFILES_FILE
    tables = read_toml(path, what="profiles")
    every = _overrides(tables.pop(_EVERY, {}))
    profiles = {}
    for name, table in tables.items():
        try:
            profiles[name] = _profile(name, table, every)
        except (KeyError, TypeError):
            raise ConfigError(f"{path}: [{name}] needs description, seeds, and tuning with factors and share") from None
    return profiles


def _profile(name: str, table: Any, every: tuple[str, ...]) -> Profile:
    tuning = Tuning(tuple(table["tuning"]["factors"]), table["tuning"]["share"])
    overrides = (*every, *_overrides(table.get("overrides", {})))
    return Profile(name, table["description"], table["seeds"], overrides, tuning)


def load_profile(name: str) -> Profile:
    """Raises ConfigError for an unknown name."""
    profiles = load_profiles()
    if name not in profiles:
        raise ConfigError(f"--profile {name} does not exist: choose one of {', '.join(profiles)}")
    return profiles[name]


def every_run() -> tuple[str, ...]:
    """The overrides that all runs of a suite share, whatever the profile."""
    return _overrides(read_toml(presets_folder() / PROFILES_FILE, what="profiles")[_EVERY])


def profile_of_this_machine() -> tuple[str, str]:
    """The name of the default profile, and why it was chosen."""
    import torch

    if torch.cuda.is_available():
        return "gpu", f"this machine has a {torch.cuda.get_device_name()}"
    return "cpu", "torch finds no CUDA device here"


def _overrides(table: object) -> tuple[str, ...]:
    """A nested table as `key=value` strings; every JSON scalar is a valid TOML value."""
    assert isinstance(table, Mapping)
    return tuple(f"{key}={json.dumps(value)}" for key, value in _flatten(table, ""))


def _flatten(table: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
