"""Learning-rate schedules as pure functions of the step.

wsd        linear warm-up, flat, then a decay over the last 1 − stable_ratio (arXiv:2404.06395)
two_stage  linear warm-up, linear decay towards half the peak until ½, then from a lower peak to the
           minimum; weight decay is off after ⅔ (BitNet training tips; Spectra, arXiv:2407.12327)
cosine     linear warm-up, then half a cosine;  constant: linear warm-up, then flat
"""

import math

from nanochat_cli.config.schema import OptimConfig

TWO_STAGE_SWITCH = 0.5
TWO_STAGE_DROP = 2 / 3  # second-stage peak over the value that the first stage would have there
WEIGHT_DECAY_OFF = 2 / 3


def lr_multiplier(step: int, total_steps: int, config: OptimConfig) -> float:
    """The factor on every peak learning rate at `step` (0-based) of `total_steps`.

    The first step runs at 1 / warmup_steps of the peak; the last step of a decay is one step before
    `min_lr_ratio` is reached exactly.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
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


def weight_decay_multiplier(step: int, total_steps: int, config: OptimConfig) -> float:
    """1, or 0 after two thirds of a two-stage run."""
    return 0.0 if config.schedule == "two_stage" and step >= WEIGHT_DECAY_OFF * total_steps else 1.0


def muon_momentum(step: int, config: OptimConfig) -> float:
    """Muon's β at a 0-based step: linear from muon_momentum_start to muon_momentum, then flat."""
    if config.muon_momentum_start is None or step >= config.muon_momentum_warmup:
        return config.muon_momentum
    share = step / config.muon_momentum_warmup
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
