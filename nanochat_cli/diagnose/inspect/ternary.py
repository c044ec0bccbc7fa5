"""Health of the ternary layers of a model: dead rows, zeros, weights at a threshold, and what says so."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.training.health.ternary import TernaryStatistics, TernaryTelemetry, layers_of

ZERO_BOUNDS = 0.1, 0.7
"""Share of zero codes of a healthy layer; a Gaussian latent has 0.31."""
LARGEST_NEAR_THRESHOLD = 0.3
"""Share of weights within 0.05 scales of a rounding threshold; a Gaussian latent has about 0.09."""
LARGEST_FLIP_RATE = 0.2
"""Share of codes that change between two measurements."""


@dataclass(frozen=True)
class LayerHealth:
    """statistics: against the measurement before, where the run has one."""

    name: str
    statistics: TernaryStatistics

    def warnings(self) -> list[str]:
        """What is not healthy; empty when all is."""
        s, (low, high) = self.statistics, ZERO_BOUNDS
        found = []
        if s.dead_rows:
            found.append(f"{s.dead_rows} dead rows")
        if not low <= s.zero_fraction <= high:
            found.append(f"{s.zero_fraction:.0%} zeros")
        if s.margin_histogram[0] > LARGEST_NEAR_THRESHOLD:
            found.append(f"{s.margin_histogram[0]:.0%} at a threshold")
        if s.flip_rate is not None and s.flip_rate > LARGEST_FLIP_RATE:
            found.append(f"{s.flip_rate:.0%} flips")
        return found

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, **asdict(self.statistics), "warnings": self.warnings()}


@torch.no_grad()
def layer_health(layers: Iterator[tuple[str, BitLinear]], telemetry: TernaryTelemetry) -> list[LayerHealth]:
    """telemetry: with the codes and scales of an earlier measurement, or empty. ValueError without ternary layers."""
    _, by_name = telemetry.measure(layers_of(layers))
    return [LayerHealth(name, statistics) for name, statistics in by_name.items()]
