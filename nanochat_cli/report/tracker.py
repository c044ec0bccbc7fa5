"""Where a run is followed from elsewhere: Weights & Biases, or trackio, which keeps the same calls and stays local.

One sink for both. What it sends is what `metrics.jsonl` gets, and the configuration; never data, weights or samples.
"""

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from nanochat_cli.errors import ConfigError
from nanochat_cli.report.environment import read_environment

Service = Literal["wandb", "trackio"]


class Tracker:
    """A run of the service, begun or continued; `log` takes what MetricsLog logs. Raises ConfigError if it fails.

    project: where the service shows it. A resumed run continues the same one: its identity is made of the folder's
    name and of when and where the run began.
    """

    def __init__(self, service: Service, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        try:
            self._module: Any = importlib.import_module(service)
        except ImportError as error:
            raise ConfigError(f"telemetry.tracker = {service}: not installed; pip install {service}") from error
        settings: dict[str, Any] = {"project": project, "name": run_dir.name, "config": dict(config), "resume": "allow"}
        if service == "wandb":
            settings |= {"id": _identity(run_dir), "dir": str(run_dir)}
        errors = getattr(self._module, "Error", RuntimeError), RuntimeError, ValueError, OSError
        try:
            self._module.init(**settings)
        except errors as error:
            raise ConfigError(f"telemetry.tracker = {service}: {' '.join(str(error).split())}") from error

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._module.log(dict(scalars), step=step)

    def finish(self) -> None:
        self._module.finish()


def _identity(run_dir: Path) -> str:
    began = (read_environment(run_dir) or {}).get("date", "")
    return hashlib.sha256(f"{run_dir.resolve()} {began}".encode()).hexdigest()[:16]
