"""`[run]`, `[checkpoint]`, `[telemetry]`: a run's folder, and what is kept and logged in it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from nanochat_cli.config.sections.section import Section


class RunConfig(Section):
    name: str | None = Field(default=None, description="folder in run.dir; default: the preset's name and a counter")
    dir: Path = Field(default=Path("runs"), description="folder that holds the runs")
    seed: int = Field(default=1337, ge=0, lt=2**63, description="seed of the initial weights and the order of batches")

    def held(self) -> dict[str, object]:
        return {"seed": self.seed}


class CheckpointConfig(Section):
    interval: PositiveInt = Field(default=500, description="steps between checkpoints")
    keep_last: PositiveInt = Field(default=2, description="latest checkpoints to keep, besides the best")
    keep_best: bool = Field(default=True, description="also keep the checkpoint with the lowest held-out bits per byte")


class TelemetryConfig(Section):
    interval: PositiveInt = Field(default=50, description="steps between ternary statistics: flips, zeros, margins")
    tensorboard: bool = Field(default=True, description="write `tensorboard/` beside `metrics.jsonl`")
    tracker: Literal["none", "wandb", "trackio"] = Field(
        default="none", description="also send the metrics there; trackio, installed by pip, keeps them on this machine"
    )
    project: str = Field(default="nanochat", min_length=1, description="the tracker's project")
    phases: bool = Field(
        default=False,
        description="also log mean times of forward, backward and optimizer since the last line, as `time/…_ms`",
    )
