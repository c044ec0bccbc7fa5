"""FIRE in a training run: when matrices go to their nearest isometry, and what follows (arXiv:2602.08040).

An event happens between two steps: the latents are replaced and quantised, the optimizer state of the changed matrices
is reset, and the learning rate climbs again. Everything is a function of the configuration, of the model, and of the
few values of `FireState`, which are in the checkpoint. The algorithm is `optim.fire`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.moe import ExpertLinear
from nanochat_cli.optim import Optimizers
from nanochat_cli.optim.fire import Change, reinitialize, relative_deviation
from nanochat_cli.training.health.dormant import dormant_fraction
from nanochat_cli.training.part import Part, Setup
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.resume import data_name

REWARM_SHARE = 0.5
"""The learning rate takes at most this share of the steps left after an event to climb again."""


@dataclass
class FireState:
    """last_step: steps that were done at the last event; rewarm_steps: in which the learning rate climbs after it."""

    events: int = 0
    last_step: int | None = None
    rewarm_steps: float | None = None


@dataclass(frozen=True)
class FireReport:
    """What an event did. changes: per matrix, by the name of its layer and `#expert` where one holds several."""

    reason: str
    changes: dict[str, Change]

    def line(self) -> str:
        """For a person."""
        left = [name for name, change in self.changes.items() if not change.reached]
        metrics = self.scalars()
        text = (
            f"FIRE ({self.reason}): {len(self.changes)} matrices, SFE {metrics['fire/sfe']:.3g} "
            f"({metrics['fire/relative_sfe']:.3g} of the squared norm), "
            f"DfI {metrics['fire/dfi_before']:.3g} → {metrics['fire/dfi_after']:.2g}"
        )
        return f"{text}; {len(left)} did not reach fire.target: {', '.join(left[:3])}" if left else text

    def scalars(self) -> dict[str, float]:
        """For the metrics log: means over the matrices, the largest DfI that is left, and SFE and DfI of each."""
        changes = self.changes.values()
        values = {
            "fire/matrices": float(len(changes)),
            "fire/sfe": fmean(change.sfe for change in changes),
            "fire/relative_sfe": fmean(change.relative_sfe for change in changes),
            "fire/dfi_before": fmean(change.dfi_before for change in changes),
            "fire/dfi_after": max(change.dfi_after for change in changes),
            "fire/deviation_before": fmean(change.deviation_before for change in changes),
            "fire/iterations": float(max(change.iterations for change in changes)),
        }
        for name, change in self.changes.items():
            values[f"fire/sfe/{name}"] = change.sfe
            values[f"fire/dfi_before/{name}"] = change.dfi_before
            values[f"fire/dfi_after/{name}"] = change.dfi_after
        return values


class Fire(Part):
    """The events of a run. Raises ConfigError when a pattern of `fire.layers` names no layer."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = setup.config.fire
        self.state = FireState()
        self.data_changed = False
        layers, patterns = setup.linears(), self.config.layers
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ConfigError(f"fire.layers = {pattern!r}: no layer has such a name; they are {', '.join(layers)}")
        self.layers = {name: layer for name, layer in layers.items() if any(fnmatchcase(name, p) for p in patterns)}

    def changes_latents(self, progress: Progress) -> bool:
        return self._known_reason(progress.step) is not None or self._is_measured(progress.step)

    def _is_measured(self, step: int) -> bool:
        return self.config.trigger in ("dormant", "isometry") and step > 0 and step % self.config.interval == 0

    def before_step(self, progress: Progress, optimizers: Optimizers) -> dict[str, float]:
        """Measures where the trigger asks for it, reinitialises when it is due, and sets the learning rate's factor."""
        config, step = self.config, progress.step
        metrics = {}
        reason = self._known_reason(step)
        if self._is_measured(step):
            name, measured, bound = self._measure(step)
            metrics[f"fire/{name}"] = measured
            if reason is None and measured >= bound and self.state.last_step != step:
                reason = f"{name.replace('_', ' ')} {measured:.3g} ≥ {bound:g}"
        if reason is not None:
            report = self.apply(step, reason, optimizers)
            left = int(REWARM_SHARE * (progress.total_steps - step))
            self.state.rewarm_steps = min(config.rewarm_steps, left)
            metrics |= report.scalars()
            self.setup.reporter.info(f"after step {step}: {report.line()}")
        rewarm = config.rewarm_steps if self.state.rewarm_steps is None else self.state.rewarm_steps
        optimizers.lr_factor = rewarm_factor(step, self.state.last_step, rewarm)
        return metrics

    def _known_reason(self, step: int) -> str | None:
        """Why it is due whatever the model looks like. One event per step, also when a run is resumed there."""
        if self.state.last_step == step:
            return None
        if self.data_changed:
            return "the data changed"
        return "listed step" if step in self.config.steps else None

    def _measure(self, step: int) -> tuple[str, float, float]:
        """Name, value and bound of the measured trigger."""
        if self.config.trigger == "dormant":
            assert self.setup.data is not None
            tokens, _ = self.setup.data.batch(step)
            fraction = dormant_fraction(self.setup.model, tokens, self.config.dormant_threshold)
            return "dormant_fraction", fraction, self.config.dormant_fraction
        deviations = [deviation for _, matrices in self.matrices() for deviation in against_random(matrices)]
        return "deviation", fmean(deviations), self.config.isometry_deviation

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Latents of the chosen layers as [n, out, in]; n is 1, or the number of experts."""
        return ((name, stacked(layer)) for name, layer in self.layers.items())

    @torch.no_grad()
    def apply(self, step: int, reason: str, optimizers: Optimizers) -> FireReport:
        """Reinitialise the chosen layers now, that is after `step` steps."""
        changes: dict[str, Change] = {}
        for name, latents in self.matrices():
            new, of_layer = reinitialize(
                latents,
                method=self.config.method,
                target=self.config.target,
                max_iterations=self.config.max_iterations,
                scale=self.config.scale,
            )
            latents.copy_(new)
            self.layers[name].requantize()
            for index, change in enumerate(of_layer):
                changes[name if len(of_layer) == 1 else f"{name}#{index}"] = change
        optimizers.reset({f"{name}.weight" for name in self.layers})
        self.state = FireState(self.state.events + 1, step)
        self.data_changed = False
        return FireReport(reason, changes)

    def values(self) -> dict[str, Any]:
        return {"fire": asdict(self.state)}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Also of a run that had it off so far."""
        saved, here = values.get("fire"), data_name(self.setup.config.data)
        self.state = FireState(**saved) if saved else FireState()
        self.data_changed = self.config.trigger == "phase" and values.get("data", here) != here


def rewarm_factor(step: int, event_step: int | None, rewarm_steps: float) -> float:
    """The factor on the learning rate of the step after `step` steps: linear from 1 / rewarm_steps to 1."""
    if event_step is None or step - event_step >= rewarm_steps:
        return 1.0
    return (step - event_step + 1) / rewarm_steps


def stacked(layer: BitLinear) -> Tensor:
    """The latent of a layer as the matrices [n, out, in] that it holds; a view."""
    latent = layer.weight.detach()
    count = layer.experts if isinstance(layer, ExpertLinear) else 1
    return latent.view(count, -1, latent.shape[1])


def against_random(matrices: Tensor) -> list[float]:
    """Relative deviation of each of [n, out, in], in units of what a random matrix of the shape has: 1 at the start."""
    rows, columns = matrices.shape[-2:]
    return (relative_deviation(matrices) * max(rows, columns) / min(rows, columns)).tolist()
