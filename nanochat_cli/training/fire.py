"""FIRE in a training run: when matrices go to their nearest isometry, and what follows (arXiv:2602.08040).

An event happens between two steps: the latents are written and quantised anew, the optimizer state of the changed
matrices is forgotten, and the learning rate climbs again. Everything is a function of the configuration, of the model,
and of the few values of `FireState`, which are in the checkpoint. The algorithm is `optim.fire`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.config.schema import FireConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.moe import ExpertLinear
from nanochat_cli.model.mtp import MTP
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim.build import Optimizers
from nanochat_cli.optim.fire import Change, reinitialize, relative_deviation
from nanochat_cli.training.dormant import dormant_fraction

REWARM_SHARE = 0.5
"""Of the steps that are left after an event, that the learning rate takes at most to climb again."""


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


class Fire:
    """The events of a run. Raises ConfigError when a pattern of `fire.layers` names no layer."""

    def __init__(self, config: FireConfig, model: Transformer, mtp: MTP | None, optimizers: Optimizers) -> None:
        self.config, self.model, self.optimizers = config, model, optimizers
        self.state = FireState()
        self.data_changed = False
        layers = dict(model.linears())
        if mtp is not None:
            layers |= {f"mtp.{name}": layer for name, layer in mtp.linears()}
        for pattern in config.layers:
            if not any(fnmatchcase(name, pattern) for name in layers):
                raise ConfigError(f"fire.layers = {pattern!r}: no layer has such a name; they are {', '.join(layers)}")
        self.layers = {
            name: layer for name, layer in layers.items() if any(fnmatchcase(name, p) for p in config.layers)
        }

    def before_step(
        self, step: int, batch: Callable[[int], tuple[Tensor, Tensor]], total_steps: int
    ) -> tuple[dict[str, float], str | None]:
        """To be called with the number of steps done, before the next one. batch: what a step trains on.

        total_steps: of the run; the learning rate climbs again within REWARM_SHARE of those that are left.

        Sets the factor on the learning rate, measures where the trigger asks for it, and reinitialises when it is due.
        Returns metrics (empty at most steps) and a line for a person, None without an event.
        """
        config, metrics = self.config, {}
        reason = self._known_reason(step)
        if config.trigger in ("dormant", "isometry") and step and step % config.interval == 0:
            name, measured, bound = self._measure(step, batch)
            metrics[f"fire/{name}"] = measured
            if reason is None and measured >= bound and self.state.last_step != step:
                reason = f"{name.replace('_', ' ')} {measured:.3g} ≥ {bound:g}"
        line = None
        if reason is not None:
            report = self.apply(step, reason)
            self.state.rewarm_steps = min(config.rewarm_steps, int(REWARM_SHARE * (total_steps - step)))
            metrics |= report.scalars()
            line = report.line()
        rewarm = config.rewarm_steps if self.state.rewarm_steps is None else self.state.rewarm_steps
        self.optimizers.lr_factor = rewarm_factor(step, self.state.last_step, rewarm)
        return metrics, line

    def _known_reason(self, step: int) -> str | None:
        """Why it is due whatever the model looks like. One event per step, also when a run is resumed there."""
        if self.state.last_step == step:
            return None
        if self.data_changed:
            return "the data changed"
        return "listed step" if step in self.config.steps else None

    def _measure(self, step: int, batch: Callable[[int], tuple[Tensor, Tensor]]) -> tuple[str, float, float]:
        """Name, value and bound of the measured trigger."""
        if self.config.trigger == "dormant":
            fraction = dormant_fraction(self.model, batch(step)[0], self.config.dormant_threshold)
            return "dormant_fraction", fraction, self.config.dormant_fraction
        deviations = [deviation for _, matrices in self.matrices() for deviation in against_random(matrices)]
        return "deviation", fmean(deviations), self.config.isometry_deviation

    def matrices(self) -> Iterator[tuple[str, Tensor]]:
        """Latents of the chosen layers as [n, out, in]; n is 1, or the number of experts."""
        return ((name, stacked(layer)) for name, layer in self.layers.items())

    @torch.no_grad()
    def apply(self, step: int, reason: str) -> FireReport:
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
        self.optimizers.reset({f"{name}.weight" for name in self.layers})
        self.state = FireState(self.state.events + 1, step)
        self.data_changed = False
        return FireReport(reason, changes)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.state)

    def load_state_dict(self, state: Mapping[str, Any] | None, *, data_changed: bool) -> None:
        """state: None of a run that had it off so far. data_changed: the run goes on with other data than it had."""
        self.state = FireState(**state) if state else FireState()
        self.data_changed = data_changed and self.config.trigger == "phase"


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
