"""A suite made from any finished runs: which are seeds of one configuration, and which of their figures compare.

Knows run folders: `config.toml`, `metrics.jsonl`, `results.json`, `tokenizer.json`. No torch; nothing is measured.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nanochat_cli.bench.matched.measures import RunOutcome, read_run, relate
from nanochat_cli.bench.matched.report.configs import Settings, settings_of
from nanochat_cli.bench.matched.report.notes import NOTES
from nanochat_cli.bench.matched.run_record import FINISHED, RunRecord, Suite
from nanochat_cli.config.load import load_run_config
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.run.find import find_run
from nanochat_cli.report.environment import read_environment
from nanochat_cli.report.metrics_log import FILE_NAME as METRICS_FILE
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.run_results import read_results

_DOCUMENTS = [
    f"data.{key}"
    for keys in (
        "path source sources glob text_field gitignore max_file_bytes generated secrets functions dedup",
        "contamination max_bytes val_fraction",
    )
    for key in keys.split()
]
_COMPRESSOR = "gzip -9"


@dataclass(frozen=True)
class _Run:
    """A finished run on disk. group: the name of its configuration in the suite."""

    folder: Path
    group: str
    seed: int
    settings: Settings
    parameters: int
    results: dict[str, Any]
    environment: dict[str, Any]
    tokenizer: str | None


def compare_runs(targets: Sequence[Path], baseline: str | None = None) -> Suite:
    """The suite of the runs that `targets` name, by path or by name inside `runs/`.

    Runs that differ only in name, folder and seed are one configuration of the suite, named after the first of them.
    baseline: the name or path of one of the runs; default: the first. `settings["notes"]` says what does not compare.
    Raises ConfigError for fewer than two runs, a run named twice or an unknown baseline, DataError for an unfinished
    run.
    """
    runs = _group([_read(folder) for folder in _folders(targets)])
    first = _baseline(runs, targets, baseline)
    notes = _notes(first, runs)
    records = [_record(run) for run in runs]
    if not _others(first, runs, _same_evaluations):
        records = relate(records, first.group)
    settings = {"baseline": first.group, "runs": [run.folder.as_posix() for run in runs], NOTES: notes}
    return Suite("compare", first.environment, settings, runs=records)


def _folders(targets: Sequence[Path]) -> list[Path]:
    if len(targets) < 2:
        raise ConfigError("a comparison needs two runs or more: name them by path, or by name inside runs/")
    folders: dict[Path, Path] = {}
    for target in targets:
        folder = find_run(target)
        if folder.resolve() in folders:
            raise ConfigError(f"{target}: this run is named twice; leave one of them out")
        folders[folder.resolve()] = folder
    return list(folders.values())


def _read(folder: Path) -> _Run:
    config = load_run_config(folder)
    _require_finished(folder, config.train.total_steps)
    try:
        tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    except OSError:
        tokenizer = None
    return _Run(
        folder=folder,
        group=folder.name,
        seed=config.run.seed,
        settings=settings_of(config),
        parameters=config.model.count_parameters().total,
        results=read_results(folder),
        environment=read_environment(folder) or {},
        tokenizer=tokenizer,
    )


def _require_finished(folder: Path, total_steps: int) -> None:
    """A run is finished when its last log entry is the final evaluation; the error says how far its checkpoints go."""
    metrics = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    if metrics and "final/bits_per_byte" in metrics[-1]:
        return
    from nanochat_cli.formats.run.checkpoints import latest_step  # imports torch, which a comparison does not need

    saved = latest_step(folder)
    state = f"step {metrics[-1]['step'] if metrics else 0} of at most {total_steps}, without a checkpoint"
    if saved is not None:
        state = f"saved at step {saved} of at most {total_steps}"
    raise DataError(
        f"{folder}: not finished ({state}); finish it with nanochat train --resume {folder}, or leave it out"
    )


def _group(runs: Sequence[_Run]) -> list[_Run]:
    """The runs with their groups named: after the first run's folder, or its full path if two groups share a name."""
    members: dict[int, list[_Run]] = {}
    keys: list[str] = []
    for run in runs:
        key = json.dumps(run.settings, sort_keys=True)
        fitting = [i for i, k in enumerate(keys) if k == key and all(run.seed != other.seed for other in members[i])]
        place = fitting[0] if fitting else len(keys)
        if not fitting:
            keys.append(key)
        members.setdefault(place, []).append(run)
    names = [group[0].folder.name for group in members.values()]
    named: dict[Path, str] = {}
    for name, group in zip(names, members.values(), strict=True):
        own = name if names.count(name) == 1 else group[0].folder.as_posix()
        named |= {run.folder: own for run in group}
    return [replace(run, group=named[run.folder]) for run in runs]


def _baseline(runs: Sequence[_Run], targets: Sequence[Path], name: str | None) -> _Run:
    """The first run of the group to which the run called `name` belongs."""
    if name is None:
        return runs[0]
    for run, target in zip(runs, targets, strict=True):
        if name in (run.group, run.folder.name, run.folder.as_posix(), str(target)):
            return next(other for other in runs if other.group == run.group)
    known = ", ".join(dict.fromkeys(run.group for run in runs))
    raise ConfigError(f"--baseline {name} is not one of the compared runs: choose one of {known}")


def _record(run: _Run) -> RunRecord:
    found, export = run.results.get("results", {}), run.results.get("export") or {}
    outcome = RunOutcome(
        FINISHED,
        parameters=run.parameters,
        optimizer_state_bytes=found.get("optimizer_state_bytes"),
        gguf_bytes=export.get("bytes"),
    )
    return read_run(Path(), run.folder.as_posix(), run.group, run.seed, outcome)


def _notes(first: _Run, runs: Sequence[_Run]) -> list[str]:
    """One sentence for each kind of figure that does not compare with the baseline's, naming the runs concerned."""
    notes = []
    if others := _others(first, runs, _same_documents):
        reason = "the [data] sections differ"
        size, theirs = _compressed(first), [value for run in others if (value := _compressed(run)) is not None]
        if size is not None and theirs:
            reason = (
                f"{_COMPRESSOR} makes {', '.join(f'{v:.4f}' for v in theirs)} bits per byte of them, not {size:.4f}"
            )
        notes.append(
            f"{_names(others)}: other held-out documents than {first.folder} ({reason}). Bits per byte have one unit, "
            "but the texts may not be equally hard."
        )
    if others := _others(first, runs, _same_tokenizer):
        notes.append(
            f"{_names(others)}: another tokenizer than {first.folder}. Bits per byte compare; loss per token, tokens "
            "and tokens per second do not."
        )
    if others := _others(first, runs, _same_part):
        notes.append(f"{_names(others)}: another eval.final_max_tokens than {first.folder}, so another part is scored.")
    if others := _others(first, runs, _same_evaluations):
        notes.append(
            f"{_names(others)}: evaluations on the way are not on the tokens of those of {first.folder}. When a run "
            "reached the baseline is left out."
        )
    if others := _others(first, runs, _same_device):
        notes.append(f"{_names(others)}: another device than {first.folder}. Times and rates do not compare.")
    return notes


def _others(first: _Run, runs: Sequence[_Run], same: Callable[[_Run, _Run], bool]) -> list[_Run]:
    return [run for run in runs if not same(first, run)]


def _same_documents(first: _Run, other: _Run) -> bool:
    """Judged by their compressed size, wherever they are stored; where that was not measured, by their source."""
    sizes = _compressed(first), _compressed(other)
    if None not in sizes:
        return sizes[0] == sizes[1]
    return all(first.settings[key] == other.settings[key] for key in _DOCUMENTS)


def _same_tokenizer(first: _Run, other: _Run) -> bool:
    return None in (first.tokenizer, other.tokenizer) or first.tokenizer == other.tokenizer


def _same_part(first: _Run, other: _Run) -> bool:
    return first.settings["eval.final_max_tokens"] == other.settings["eval.final_max_tokens"]


def _same_evaluations(first: _Run, other: _Run) -> bool:
    """Whether the periodic evaluations of both score the same tokens."""
    sample = first.settings["eval.max_tokens"] == other.settings["eval.max_tokens"]
    return sample and _same_documents(first, other) and _same_tokenizer(first, other)


def _same_device(first: _Run, other: _Run) -> bool:
    devices = first.environment.get("device"), other.environment.get("device")
    return None in devices or devices[0] == devices[1]


def _compressed(run: _Run) -> float | None:
    """Bits per byte to which the compressor reduces the held-out documents."""
    return (run.results.get("baselines") or {}).get(_COMPRESSOR)


def _names(runs: Sequence[_Run]) -> str:
    return ", ".join(str(run.folder) for run in runs)
