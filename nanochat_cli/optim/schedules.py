"""Learning-rate schedules as pure functions of the step.

wsd        linear warm-up, flat, then a decay over the last 1 − stable_ratio (arXiv:2404.06395)
two_stage  linear warm-up, linear decay towards half the peak until ½, then from a lower peak to the
           minimum; weight decay is off after ⅔ (BitNet training tips; Spectra, arXiv:2407.12327)
cosine     linear warm-up, then half a cosine;  constant: linear warm-up, then flat

Warm-ups are configured in steps, but limited to a share of the run: a run of a dozen steps has one too.
"""

import math
from dataclasses import dataclass, replace

from nanochat_cli.config.sections.optim import OptimConfig

WARM_UP_SHARE = 0.2
"""Largest share of a run for the warm-up of the learning rate."""
OTHER_SHARE = 1 / 3
"""Largest share of a run for the warm-ups of Muon's momentum and of token filtering."""

TWO_STAGE_SWITCH = 0.5
TWO_STAGE_DROP = 2 / 3  # second-stage peak over the value that the first stage would have there
WEIGHT_DECAY_OFF = 2 / 3


@dataclass(frozen=True)
class WarmUps:
    """Steps of the warm-ups of one run: of the learning rate, of Muon's momentum, of token filtering."""

    rate: float
    momentum: float
    filtering: float = 0.0

    @classmethod
    def configured(cls, config: OptimConfig, filtering: int = 0) -> "WarmUps":
        """As configured, while the length of the run is unknown. filtering: collider.warmup_steps."""
        return cls(config.warmup_steps, config.muon_momentum_warmup, filtering)

    def within(self, total_steps: int) -> "WarmUps":
        """Limited to their shares of a run of `total_steps`."""
        rate = min(self.rate, int(WARM_UP_SHARE * total_steps))
        other = int(OTHER_SHARE * total_steps)
        return WarmUps(rate, min(self.momentum, other), min(self.filtering, other))

    def after(self, step: int, past: "WarmUps") -> "WarmUps":
        """These, after `step` steps under `past`: the rate does not fall for it, and a finished one stays finished."""
        rate = past.rate if step >= past.rate else min(self.rate, past.rate * (step + 1) / max(step, 1))
        return replace(self, rate=rate, filtering=past.filtering if step >= past.filtering else self.filtering)


def lr_multiplier(step: int, total_steps: int | None, config: OptimConfig, warm_up: float | None = None) -> float:
    """The factor on every peak learning rate at `step` (0-based) of `total_steps`; None: nothing decays yet.

    warm_up: its steps; by default those that fit total_steps. The first step runs at 1 / warm_up of the peak; the last
    step of a decay is one step before `min_lr_ratio` is reached exactly.
    """
    if warm_up is None:
        asked = WarmUps.configured(config)
        warm_up = (asked if total_steps is None else asked.within(total_steps)).rate
    if step < warm_up:
        return min(1.0, (step + 1) / warm_up)
    if total_steps is None:
        return 1.0
    span = max(1, total_steps - warm_up)
    progress = min(1.0, (step - warm_up) / span)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        return _between(config.min_lr_ratio, 0.5 * (1 + math.cos(math.pi * progress)))
    if config.schedule == "two_stage":
        return _two_stage(step / max(1, total_steps), config)
    start = config.stable_ratio * total_steps
    if step <= start or start >= total_steps:
        return 1.0
    return _between(config.min_lr_ratio, _decay((step - start) / (total_steps - start), config.decay_shape))


def weight_decay_multiplier(step: int, total_steps: int | None, config: OptimConfig) -> float:
    """1, or 0 after two thirds of a two-stage run."""
    if config.schedule != "two_stage" or total_steps is None:
        return 1.0
    return 0.0 if step >= WEIGHT_DECAY_OFF * total_steps else 1.0


def muon_momentum(step: int, config: OptimConfig, warm_up: float | None = None) -> float:
    """Muon's β at a 0-based step: linear from muon_momentum_start to muon_momentum in `warm_up` steps, then flat.

    warm_up: by default muon_momentum_warmup.
    """
    warm_up = config.muon_momentum_warmup if warm_up is None else warm_up
    if config.muon_momentum_start is None or step >= warm_up:
        return config.muon_momentum
    share = step / warm_up
    return config.muon_momentum_start + share * (config.muon_momentum - config.muon_momentum_start)


def _between(floor: float, factor: float) -> float:
    return floor + (1 - floor) * factor


def _decay(progress: float, shape: str) -> float:
    if shape == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if shape == "sqrt":
        return 1 - math.sqrt(progress)
    return 1 - progress


def _two_stage(progress: float, config: OptimConfig) -> float:
    linear = 1 - progress
    return _between(config.min_lr_ratio, linear if progress < TWO_STAGE_SWITCH else linear * TWO_STAGE_DROP)
