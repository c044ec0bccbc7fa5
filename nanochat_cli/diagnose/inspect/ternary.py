"""Health of a model's ternary layers: dead rows, zeros, weights at a threshold, and warnings about them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.training.health.ternary import TernaryStatistics, TernaryTelemetry, layers_of

ZERO_BOUNDS = 0.1, 0.7
"""Range of the share of zero codes in a healthy layer; a Gaussian latent has 0.31."""
LARGEST_NEAR_THRESHOLD = 0.3
"""Share of weights within 0.05 scales of a rounding threshold; a Gaussian latent has about 0.09."""
LARGEST_FLIP_RATE = 0.2
"""Share of codes that change between two measurements."""


@dataclass(frozen=True)
class LayerHealth:
    """statistics: relative to the run's previous measurement, if any."""

    name: str
    statistics: TernaryStatistics

    def warnings(self) -> list[str]:
        """Short texts about what is unhealthy."""
        s, (low, high) = self.statistics, ZERO_BOUNDS
        warnings = []
        if s.dead_rows:
            warnings.append(f"{s.dead_rows} dead rows")
        if not low <= s.zero_fraction <= high:
            warnings.append(f"{s.zero_fraction:.0%} zeros")
        if s.margin_histogram[0] > LARGEST_NEAR_THRESHOLD:
            warnings.append(f"{s.margin_histogram[0]:.0%} at a threshold")
        if s.flip_rate is not None and s.flip_rate > LARGEST_FLIP_RATE:
            warnings.append(f"{s.flip_rate:.0%} flips")
        return warnings

    def as_dict(self) -> dict[str, object]:
        return {"name": self.name, **asdict(self.statistics), "warnings": self.warnings()}


@torch.no_grad()
def layer_health(layers: Iterator[tuple[str, BitLinear]], telemetry: TernaryTelemetry) -> list[LayerHealth]:
    """telemetry: holds the codes and scales of an earlier measurement, or nothing. ValueError without layers."""
    _, by_name = telemetry.measure(layers_of(layers))
    return [LayerHealth(name, statistics) for name, statistics in by_name.items()]
