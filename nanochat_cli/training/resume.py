"""What may change when a run is resumed, and where it then continues.

Knows configurations and the plain values of a checkpoint. Keys that say what a checkpoint holds cannot change; what is
changed otherwise has its effect from here on: a longer run moves the decay, other batches go on at the window where the
old ones ended. Without a change a run continues bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanochat_cli.config.load import CONFIG_FILE, load_run_config
from nanochat_cli.config.schema import Config, DataConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.run.checkpoints import Checkpoint
from nanochat_cli.optim.schedules import WarmUps
from nanochat_cli.training.progress import Progress


def require_resumable(checkpoint: Checkpoint, run_dir: Path, config: Config) -> dict[str, Any]:
    """The keys that `config` changes -> their values until now.

    Raises DataError naming the first key that says what the checkpoint holds.
    """
    before = _saved_config(checkpoint, run_dir)
    if before is None:
        return {}
    then, now = held(before), held(config)
    for key in then | now:
        if then.get(key) != now.get(key):
            old, new = (_value(one, key) for one in (before, config))
            raise DataError(
                f"{checkpoint.path} was trained with another {key} ({old}, not {new}), and its contents depend on it: "
                f"resume with --set {key}={old}, or start a new run"
            )
    return _differences(before.model_dump(mode="json"), config.model_dump(mode="json"))


def held(config: Config) -> dict[str, object]:
    """The keys beside [model] that say what a checkpoint holds and in which order it reads, as their sections tell."""
    return {f"{name}.{key}": value for name, section in config for key, value in section.held().items()}


def restored_progress(saved: Mapping[str, Any], config: Config, changed: Mapping[str, Any], asked: WarmUps) -> Progress:
    """The progress to continue from. asked: the warm-ups of `config`.

    Raises ConfigError when what bounds the run was changed to what it has used up.
    """
    warm_ups = saved.get("warm_ups")
    progress = Progress(**{**saved, "warm_ups": asked if warm_ups is None else WarmUps(**warm_ups)})
    train = config.train
    if "train.batch_size" in changed:
        progress.micro_batch = train.batch_size
    bounds = {"train.total_steps", "train.time_budget"} & changed.keys()
    if train.time_budget is None:
        progress.total_steps, progress.total_is_final = train.total_steps, True
    elif bounds:
        progress.total_steps, progress.total_is_final = train.total_steps, False
    if bounds:
        _require_more(progress, config)
    if bounds or "optim.warmup_steps" in changed:
        fitting = asked.within(progress.total_steps) if progress.total_is_final else asked
        progress.warm_ups = fitting.after(progress.step, progress.warm_ups or asked)
    return progress


def shift_of(progress: Progress, config: Config) -> int:
    """Windows by which the order of batches has to be moved to go on where the run stopped; 0 without a change."""
    read = progress.tokens // config.train.seq_len
    return read - progress.step * config.train.batch_size * config.train.grad_accum


def data_name(data: DataConfig) -> str:
    """A name for the training data, to notice that a resumed run has other data."""
    return data.named_source if data.path is None else str(data.path.resolve())


def _require_more(progress: Progress, config: Config) -> None:
    total, budget = config.train.total_steps, config.train.time_budget
    if total <= progress.step:
        raise ConfigError(
            f"train.total_steps = {total}: the run has taken {progress.step} steps; set more to go on from there"
        )
    used = progress.seconds - progress.excess_seconds
    if budget is not None and used >= budget:
        raise ConfigError(
            f"train.time_budget = {budget:g}: the run has used {used:.1f} s of it; set more, or train.time_budget=none"
        )


def _saved_config(checkpoint: Checkpoint, run_dir: Path) -> Config | None:
    """The configuration that a checkpoint was trained with; if it holds none, that of its run."""
    saved = checkpoint.state.get("config")
    if saved is not None:
        return Config.model_validate(saved)
    return load_run_config(run_dir) if (run_dir / CONFIG_FILE).is_file() else None


def _value(config: Config, key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in then.items():
        if isinstance(value, Mapping):
            found |= _differences(value, now[key], f"{prefix}{key}.")
        elif now[key] != value:
            found[prefix + key] = value
    return found
