"""What a suite will run: contenders, seeds, what is made equal, and the order. Written to `suite.json`.

A plan names presets and overrides; this file also resolves them and applies `--match`. Running is left to
`bench.matched.suite`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from nanochat_cli.bench.matched.noise import REPEAT
from nanochat_cli.bench.matched.run_record import write_text
from nanochat_cli.bench.matched.tuning import Tuning, rates, same_training, shorten
from nanochat_cli.config.effects import why_without_effect
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.overrides import parse_override
from nanochat_cli.config.schema import Config, TrainConfig
from nanochat_cli.config.sources import read_source
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.nesting import parse_json

PLAN_FILE = "suite.json"
RUNS_FOLDER = "runs"
CONFIGS = "baseline", "mtp-only", "muon-8bit", "galore2", "full", "best"
"""The five published ones, and our own bundle."""
ABLATIONS = "collider-only", "async-only", "8bit-only", "galore-only"
E3_BASELINE, AB_BASELINE = "baseline", "base"
MORE_STEPS = 10
"""With --match time a contender may take this many times the baseline's steps; the clock ends its schedule."""

Match = Literal["steps", "tokens", "time"]
LENGTHS = ("train.total_steps", "train.time_budget", "total_steps")


@dataclass(frozen=True)
class Contender:
    """One configuration to compare: presets, left to right, and the overrides on top of them."""

    name: str
    presets: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The name in a form that fits into a file name."""
        return re.sub(r"[^\w.=+-]+", "-", self.name)


@dataclass(frozen=True)
class Plan:
    """The first contender is the baseline. profile: None for `ab`; given: the user's own --set.

    tuning: None if every contender keeps the learning rate of its preset.
    """

    suite: Literal["e3", "ab"]
    profile: str | None
    match: Match
    seeds: int
    contenders: tuple[Contender, ...]
    given: tuple[str, ...] = ()
    tuning: Tuning | None = None

    @property
    def baseline(self) -> Contender:
        return self.contenders[0]

    def settings(self) -> dict[str, Any]:
        """The plan as the report shows it."""
        return {
            "profile": self.profile,
            "match": self.match,
            "seeds": self.seeds,
            "baseline": self.baseline.name,
            "presets": {contender.name: " ".join(contender.presets) for contender in self.contenders},
            "set": " ".join(self.given),
        }


@dataclass(frozen=True)
class Entry:
    """One run of a plan. rate: the learning rate that a tuning run tries; None for a run that is compared."""

    contender: Contender
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        return f"{self.contender.stem}-{f'seed{self.seed}' if self.rate is None else f'lr{self.rate:g}'}"

    @property
    def run(self) -> str:
        """The run's folder, relative to the suite's."""
        return f"{RUNS_FOLDER}/{self.name}"


def plan_e3(
    *,
    profile: str,
    profile_overrides: Sequence[str],
    configs: Sequence[str] | None,
    ablations: bool,
    seeds: int,
    match: Match,
    given: Sequence[str],
    tuning: Tuning | None = None,
) -> Plan:
    """CONFIGS, or those named, plus the isolated methods on request; the baseline always runs, twice.

    Raises ConfigError for an unknown name.
    """
    chosen = list(configs) if configs is not None else list(CONFIGS)
    if unknown := [name for name in chosen if name not in (*CONFIGS, *ABLATIONS)]:
        known = ", ".join((*CONFIGS, *ABLATIONS))
        raise ConfigError(f"--configs {unknown[0]}: no such configuration; choose from {known}")
    names = dict.fromkeys([E3_BASELINE, *chosen, *(ABLATIONS if ablations else ())])
    overrides = (*profile_overrides, *given)
    contenders = [Contender(name, (f"e3/{name}",), overrides) for name in names]
    contenders.append(Contender(REPEAT, (f"e3/{E3_BASELINE}",), overrides))
    return _checked(Plan("e3", profile, match, seeds, tuple(contenders), tuple(given), tuning))


def natural_match(presets: Sequence[str], overrides: Sequence[str]) -> Match:
    """What ends a run of this configuration: its time budget if it has one, else its steps."""
    return "steps" if resolve_config(presets, None, overrides).train.time_budget is None else "time"


def plan_ab(
    *,
    base: Sequence[str],
    vary: Sequence[str],
    overrides: Sequence[str],
    seeds: int,
    match: Match,
    given: Sequence[str],
) -> Plan:
    """The base, and one contender for each change to it. Raises ConfigError for a change that is missing or void."""
    if not vary:
        raise ConfigError("--vary is missing: name what differs from the base, such as --vary optim.lr=0.01")
    if doubled := [text for text in vary if list(vary).count(text) > 1]:
        raise ConfigError(f"--vary {doubled[0]} is given twice")
    common = (*overrides, *given)
    contenders = [Contender(AB_BASELINE, tuple(base), common)]
    for text in vary:
        changes = assignments(text)
        settings = (*common, *changes)
        for change in changes:
            (key,) = parse_override(change)
            if key in LENGTHS:
                raise ConfigError(
                    f"--vary {change}: --match makes the length of runs equal; change it for all with --set"
                )
            (written,) = read_source(parse_override(change), "--vary")
            if (reason := why_without_effect(written, resolve_config(base, None, settings))) is not None:
                raise ConfigError(f"--vary {change} changes nothing: it {reason}")
        contenders.append(Contender(text, tuple(base), settings))
    return _checked(Plan("ab", None, match, seeds, tuple(contenders), tuple(given)))


def assignments(text: str) -> list[str]:
    """`"optim.lr=0.1 optim.betas=[0.9, 0.95]"` → its two assignments; spaces inside a value are kept."""
    return re.split(r"\s+(?=[\w.]+\s*=)", text.strip())


def entries(plan: Plan) -> list[Entry]:
    """Runs in order: seeds are the outer loop and the order of contenders alternates, so machine drift hits them all.

    With --match time the baseline always comes first, since it sets the time.
    """
    runs = []
    for seed in range(plan.seeds):
        turn = plan.contenders if seed % 2 == 0 else plan.contenders[::-1]
        if plan.match == "time":
            turn = (plan.baseline, *(contender for contender in turn if contender != plan.baseline))
        runs += [Entry(contender, seed) for contender in turn]
    return runs


def tuning_entries(plan: Plan) -> list[Entry]:
    """The runs that precede those of `entries`: every rate of every contender, skipping those that train alike."""
    if plan.tuning is None:
        return []
    own = [contender for contender in plan.contenders if stands_for(plan, contender) == contender]
    return [Entry(contender, 0, rate) for contender in own for rate in rates(_resolved(contender), plan.tuning)]


def stands_for(plan: Plan, contender: Contender) -> Contender:
    """The first contender that trains like this one; its tuning runs count for both."""
    config = _resolved(contender)
    return next(other for other in plan.contenders if same_training(_resolved(other), config))


def resolve(
    plan: Plan, entry: Entry, folder: Path, baseline_seconds: float | None = None, rate: float | None = None
) -> Config:
    """The configuration of a run in the suite's `folder`.

    baseline_seconds: with --match time, the training time of the baseline's run with the same seed; unused for the
    baseline itself. rate: the learning rate that tuning chose; None keeps the contender's own. Raises ConfigError.
    """
    config = _resolved(entry.contender)
    config.run.seed += entry.seed
    config.run.dir, config.run.name = folder / RUNS_FOLDER, entry.name
    if entry.rate is not None:
        assert plan.tuning is not None
        shorten(config, plan.tuning, entry.rate)
        return config
    if rate is not None:
        config.optim.lr = rate
    if entry.contender == plan.baseline:
        return config
    reference = _resolved(plan.baseline).train
    if plan.match == "steps":
        config.train.total_steps = reference.total_steps
    elif plan.match == "tokens":
        tokens = reference.total_steps * _tokens_per_step(reference)
        config.train.total_steps = math.ceil(tokens / _tokens_per_step(config.train))
    else:
        config.train.total_steps = MORE_STEPS * reference.total_steps
        config.train.time_budget = baseline_seconds
    return config


def save_plan(plan: Plan, folder: Path) -> None:
    """Write `folder/suite.json`. Raises DataError."""
    write_text(folder / PLAN_FILE, json.dumps(asdict(plan), indent=1, ensure_ascii=False))


def load_plan(folder: Path) -> Plan:
    """Raises DataError if `folder` is not the folder of a suite."""
    path = folder / PLAN_FILE
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
        contenders = tuple(
            Contender(values["name"], tuple(values["presets"]), tuple(values["overrides"]))
            for values in found.pop("contenders")
        )
        tuning = found.pop("tuning", None)
        if tuning is not None:
            tuning = Tuning(tuple(tuning["factors"]), tuning["share"])
        return Plan(**found | {"contenders": contenders, "given": tuple(found["given"]), "tuning": tuning})
    except OSError as error:
        raise DataError(f"{folder}: not the folder of a suite (no {PLAN_FILE}: {error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the plan of a suite ({type(error).__name__}: {error})") from error


def _checked(plan: Plan) -> Plan:
    """The plan, once every configuration resolves. Raises ConfigError."""
    if plan.match not in get_args(Match):
        raise ConfigError(f"--match {plan.match} does not exist: choose one of {', '.join(get_args(Match))}")
    train = _resolved(plan.baseline).train
    if plan.match != "time" and train.time_budget is not None:
        raise ConfigError(
            f"--match {plan.match}: the baseline has train.time_budget = {train.time_budget:g}; take --match time, "
            "or --set train.time_budget=none --set train.total_steps=N"
        )
    for contender in plan.contenders:
        _resolved(contender)
    return plan


def _resolved(contender: Contender) -> Config:
    return resolve_config(contender.presets, None, contender.overrides)


def _tokens_per_step(train: TrainConfig) -> int:
    return train.batch_size * train.grad_accum * train.seq_len
