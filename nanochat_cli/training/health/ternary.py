"""Statistics of ternary layers while they train: flips, zeros, distance to the thresholds, scale drift.

All layers are counted on their device, and one `.tolist()` at the end is the only host synchronisation.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.training.distributed.group import Group
from nanochat_cli.training.part import Part, Setup
from nanochat_cli.training.progress import Progress

MARGIN_EDGES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0)
"""Lower edges of the margin histogram; the last bin is open. A zero code has a margin of at most 0.5."""

COUNTS = 3 + len(MARGIN_EDGES) + 2
"""Numbers that are counted in a layer, see `count_layer` and `count_changes`."""

Layer = tuple[str, Tensor, Tensor, Tensor]
"""name, codes int8 [N, K], latent float32 [N, K], scales float32 ([1, 1] tensor, [N, 1] row, [N, K / g] groups)."""


class Elsewhere(NamedTuple):
    """sizes: weights and scales of every layer, by name. group: the ranks, each of which has some of the layers."""

    sizes: dict[str, tuple[int, int]]
    group: Group


@dataclass(frozen=True)
class TernaryStatistics:
    """Statistics of one layer, or of all layers together (every weight counts the same)."""

    weights: int
    zero_fraction: float
    dead_rows: int
    """Rows without a non-zero code: outputs that are always 0."""
    margin_histogram: tuple[float, ...]
    """Shares of weights by ||w| / s − 0.5|, in units of the scale, over the bins of MARGIN_EDGES."""
    scale_mean: float
    flip_rate: float | None
    """Share of codes that differ from those of the previous measurement; None at the first one."""
    scale_drift: float | None
    """Mean of |s / s_previous − 1| over the scales; None at the first measurement."""

    def scalars(self) -> dict[str, float]:
        """For the metrics log, under `ternary/`; `near_threshold` is the share of weights in the first margin bin."""
        values = {
            "ternary/flip_rate": self.flip_rate,
            "ternary/zero_fraction": self.zero_fraction,
            "ternary/dead_rows": float(self.dead_rows),
            **{f"ternary/margin_{e:g}": s for e, s in zip(MARGIN_EDGES, self.margin_histogram, strict=True)},
            "ternary/near_threshold": self.margin_histogram[0],
            "ternary/scale_mean": self.scale_mean,
            "ternary/scale_drift": self.scale_drift,
        }
        return {name: value for name, value in values.items() if value is not None}


class TernaryTelemetry:
    """Measures layers against the codes and scales of the previous measurement, of which it keeps a copy."""

    def __init__(self) -> None:
        self._codes: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(
        self, layers: Iterable[Layer], elsewhere: Elsewhere | None = None
    ) -> tuple[TernaryStatistics, dict[str, TernaryStatistics]]:
        """Statistics of all layers together, and of each by name. Raises ValueError without layers.

        elsewhere: all layers, where other ranks have the rest of them.
        """
        sizes: dict[str, tuple[int, int]] = {}
        rows: dict[str, Tensor] = {}
        for name, codes, latent, scales in layers:
            sizes[name] = codes.numel(), scales.numel()
            changes = count_changes(codes, scales, self._codes.get(name), self._scales.get(name))
            rows[name] = torch.cat([count_layer(codes, latent, scales), changes])
            self._codes[name] = codes.clone()
            self._scales[name] = scales.clone()
        if elsewhere is not None:
            sizes = elsewhere.sizes
            nothing = torch.zeros(COUNTS, dtype=torch.float64, device=elsewhere.group.device)
            summed = elsewhere.group.add(torch.stack([rows.get(name, nothing) for name in sizes]))
            rows = dict(zip(sizes, summed, strict=True))
        if not rows:
            raise ValueError("no ternary layers to measure")
        counts: list[list[float]] = torch.stack(list(rows.values())).tolist()
        by_name = {name: _statistics(*sizes[name], row) for name, row in zip(sizes, counts, strict=True)}
        weights, scale_count = (sum(column) for column in zip(*sizes.values(), strict=True))
        total = [sum(column) for column in zip(*counts, strict=True)]
        return _statistics(weights, scale_count, total), by_name

    def state_dict(self) -> dict[str, Any]:
        """Codes (int8) and scales of the last measurement: what the next one is compared with after a resume."""
        return {"codes": dict(self._codes), "scales": dict(self._scales)}

    def load_state_dict(
        self,
        state: Mapping[str, Mapping[str, Tensor]],
        device: str | torch.device = "cpu",
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """wanted: the names of layers that will be measured here."""
        self._codes = {name: codes.to(device) for name, codes in state["codes"].items() if wanted(name)}
        self._scales = {name: scales.to(device) for name, scales in state["scales"].items() if wanted(name)}


def layers_of(named: Iterable[tuple[str, BitLinear]]) -> list[Layer]:
    """Named ternary layers as they are now, for `measure`."""
    layers = []
    for name, layer in named:
        ternary = layer.ternary()
        layers.append((name, ternary.codes, layer.weight.detach(), ternary.scales))
    return layers


class TernaryHealth(Part):
    """Statistics of a model's ternary layers every `telemetry.interval` steps."""

    report = "ternary", "Ternary weights"

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.telemetry = TernaryTelemetry()

    def observe(self, progress: Progress) -> dict[str, float]:
        """Each rank counts in what it owns: no other has the latents."""
        if progress.step % self.setup.config.telemetry.interval:
            return {}
        named = dict(self.setup.model.ternary_layers())
        if self.owned is None:
            return self.telemetry.measure(layers_of(named.items()))[0].scalars()
        sizes = {name: (layer.weight.numel(), _scale_count(layer)) for name, layer in named.items()}
        own = self.owned.own_layers(named)
        return self.telemetry.measure(own, Elsewhere(sizes, self.owned.group))[0].scalars()

    def tensors(self) -> dict[str, Any]:
        return {"telemetry": self.telemetry.state_dict()}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        owned = self.owned
        self.telemetry.load_state_dict(
            tensors["telemetry"], self.setup.device, lambda name: owned is None or f"{name}.weight" in owned.mine
        )


def _scale_count(layer: BitLinear) -> int:
    return 1 if layer.quant.scale == "tensor" else layer.scales.numel()


def margins(latent: Tensor, scales: Tensor) -> Tensor:
    """Distance ||w| / s − 0.5| of every weight to the nearer rounding threshold, in units of its scale: [N, K]."""
    rows, columns = latent.shape
    groups = scales.shape[1]
    relative = latent.reshape(rows, groups, columns // groups).abs() / scales.unsqueeze(-1)
    return (relative - 0.5).abs().reshape(rows, columns)


def count_layer(codes: Tensor, latent: Tensor, scales: Tensor) -> Tensor:
    """float64 [3 + len(MARGIN_EDGES)]: zero codes, rows of zeros, sum of scales, weights per margin bin."""
    margin = margins(latent, scales)
    # at_least[i] counts margins ≥ edge i; differences are the bins. No bincount: on CUDA it would synchronise.
    at_least = torch.stack([(margin >= edge).sum() for edge in MARGIN_EDGES])
    bins = at_least - torch.cat([at_least[1:], at_least.new_zeros(1)])
    dead = (codes == 0).all(dim=1).sum().double()
    zeros_and_scales = torch.stack([(codes == 0).sum().double(), dead, scales.sum(dtype=torch.float64)])
    return torch.cat([zeros_and_scales, bins.double()])


def count_changes(
    codes: Tensor, scales: Tensor, previous_codes: Tensor | None, previous_scales: Tensor | None
) -> Tensor:
    """float64 [2]: codes that differ, and the sum of |s / s_previous − 1|; NaN with nothing to compare with."""
    if previous_codes is None or previous_scales is None:
        return torch.full((2,), torch.nan, dtype=torch.float64, device=codes.device)
    flips = (codes != previous_codes).sum().double()
    drift = (scales.double() / previous_scales.double() - 1).abs().sum()
    return torch.stack([flips, drift])


def _statistics(weights: int, scale_count: int, counts: Sequence[float]) -> TernaryStatistics:
    """Statistics from the numbers of `count_layer` and `count_changes`, of one layer or summed over layers."""
    zeros, dead_rows, scale_sum, *bins, flips, drift = counts
    first = flips != flips  # NaN: at least one layer had nothing to compare with
    return TernaryStatistics(
        weights=weights,
        zero_fraction=zeros / weights,
        dead_rows=int(dead_rows),
        margin_histogram=tuple(count / weights for count in bins),
        scale_mean=scale_sum / scale_count,
        flip_rate=None if first else flips / weights,
        scale_drift=None if first else drift / scale_count,
    )
