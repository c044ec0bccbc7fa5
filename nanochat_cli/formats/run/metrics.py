"""The metrics of a run as its configuration wants them: on disk, for TensorBoard, and for a service that follows it."""

from pathlib import Path

from nanochat_cli.config.schema import Config
from nanochat_cli.report.metrics_log import MetricsLog
from nanochat_cli.report.tracker import Tracker


def open_metrics(run_dir: Path, config: Config, resumed_step: int | None = None) -> MetricsLog:
    """resumed_step: see MetricsLog. Raises DataError, or ConfigError if the tracker cannot be reached."""
    telemetry, tracker = config.telemetry, None
    if telemetry.tracker != "none":
        tracker = Tracker(telemetry.tracker, telemetry.project, run_dir, config.model_dump(mode="json"))
    return MetricsLog(run_dir, telemetry.tensorboard, resumed_step, tracker)
