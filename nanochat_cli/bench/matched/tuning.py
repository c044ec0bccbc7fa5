"""Tunes the learning rate of every contender before a suite compares them: the same factors and run lengths for each.

A rate that suits one optimizer handicaps another. Every contender trains with its own rate times each of `factors`, on
a seed that no compared run uses, and is then compared at the rate with the fewest held-out bits per byte. The outcome
is kept in `tuning.json` in the folder of the suite; a resumed suite does not tune again.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import DataError, reason
from nanochat_cli.nesting import parse_json

TUNING_FILE = "tuning.json"
KEY = "optim.lr"
SEED = 1000
"""Added to the seed of a tuning run; compared seeds begin at 0."""


@dataclass(frozen=True)
class Tuning:
    """factors: multiply a contender's own rate; share: how many of its steps a tuning run takes."""

    factors: tuple[float, ...]
    share: float


@dataclass(frozen=True)
class Tuned:
    """The outcome of tuning. tried: by contender, rate -> bits per byte, None for a run that did not finish.

    chosen: by contender; one whose runs all failed is absent and keeps its own rate.
    """

    seed: int
    steps: int
    tried: dict[str, dict[float, float | None]] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)
    key: str = KEY

    def at_the_edge(self) -> list[str]:
        """Contenders whose best rate is the smallest or largest that was tried, so that a better one may exist."""
        return [name for name, rate in self.chosen.items() if rate in (min(self.tried[name]), max(self.tried[name]))]


def choose(tried: Mapping[str, Mapping[float, float | None]], *, seed: int, steps: int) -> Tuned:
    """For each contender, the rate with the fewest bits per byte."""
    chosen = {}
    for name, grid in tried.items():
        finished = {rate: bits for rate, bits in grid.items() if bits is not None and math.isfinite(bits)}
        if finished:
            chosen[name] = min(finished, key=finished.__getitem__)
    return Tuned(seed, steps, {name: dict(grid) for name, grid in tried.items()}, chosen)


def rates(config: Config, tuning: Tuning) -> list[float]:
    """The rates that a contender tries, in rising order, to three digits."""
    return sorted(float(f"{config.optim.lr * factor:.3g}") for factor in tuning.factors)


def shorten(config: Config, tuning: Tuning, rate: float) -> None:
    """Turn a compared run's configuration, in place, into a tuning run: a miniature of it, evaluated at its end."""
    train, share = config.train, tuning.share
    train.total_steps, train.time_budget = max(1, round(share * train.total_steps)), None
    config.optim.lr = rate
    config.run.seed += SEED
    config.optim.warmup_steps = round(share * config.optim.warmup_steps)
    config.collider.warmup_steps = round(share * config.collider.warmup_steps)
    config.optim.galore.update_freq = max(1, round(share * config.optim.galore.update_freq))
    config.eval.interval = config.checkpoint.interval = train.total_steps


def same_training(one: Config, other: Config) -> bool:
    """Whether two configurations train alike, so that tuning one is enough: name, folder and loader do not matter."""
    return _training(one) == _training(other)


def _training(config: Config) -> dict[str, Any]:
    return config.model_dump(exclude={"run": {"name", "dir"}, "loader": {"enabled", "workers", "prefetch"}})


def save_tuned(folder: Path, tuned: Tuned) -> None:
    write_atomically(folder / TUNING_FILE, (json.dumps(asdict(tuned), indent=1) + "\n").encode())


def load_tuned(folder: Path) -> Tuned | None:
    """None unless tuning has been completed. Raises DataError for a file in another form."""
    path = folder / TUNING_FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        tried = {name: {float(rate): bits for rate, bits in grid.items()} for name, grid in found.pop("tried").items()}
        return Tuned(**found, tried=tried)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a record of tuning ({type(error).__name__}: {reason(error)})") from error


def tuning_notes(tuned: Tuned | None) -> list[str]:
    """What a reader must know about the learning rates of a suite: not tuned, or not far enough."""
    if tuned is None:
        return [UNTUNED]
    if not (names := tuned.at_the_edge()):
        return []
    return [f"Best {tuned.key} at the end of what was tried, so that a better one may exist: {', '.join(names)}."]


UNTUNED = (
    "Learning rates are those of the presets and were not tuned for each configuration (--tune): one with another "
    "optimizer may only lack its own rate."
)
