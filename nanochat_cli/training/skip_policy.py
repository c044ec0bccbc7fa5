"""Which optimizer steps are skipped: those whose loss or gradient norm is not finite, or whose norm spikes.

A spike is one batch, or a few. A norm that stays high is a new level, which skipping could never bring down: the step
is taken, clipped, and the running mean starts over. So only values that are not finite can end a run.

Sees two numbers per step and decides; `training.update` acts on it. The state is a plain dictionary, which belongs in
the checkpoint because decisions depend on it.
"""

import math
from dataclasses import asdict, dataclass

from nanochat_cli.errors import Diverged

PATIENCE = 3
"""At most this many steps in a row are skipped for a norm that is high but finite."""


@dataclass
class SkipState:
    """The values that the next decision depends on."""

    mean_sum: float = 0.0  # exponential sum of the accepted norms, before bias correction
    accepted: int = 0
    skipped: int = 0
    consecutive: int = 0
    not_finite: int = 0  # steps in a row, up to the last one, whose loss or norm was not finite


class SkipPolicy:
    """Skips steps that are not finite, and up to PATIENCE in a row of a norm above `spike_factor` × its running mean.

    The mean is an exponential moving average with bias correction (as of Adam's moments, arXiv:1412.6980), `decay`
    per accepted step; skipped steps do not enter it. For the first `warmup_steps` accepted steps only non-finite ones
    are skipped, since norms fall fast at the start, and again after PATIENCE. advice: the last words of the error when
    a run diverges.
    """

    def __init__(
        self,
        spike_factor: float,
        max_skipped_steps: int,
        *,
        warmup_steps: int = 20,
        decay: float = 0.98,
        advice: str = "lower optim.lr",
    ) -> None:
        self.spike_factor = spike_factor
        self.max_skipped_steps = max_skipped_steps
        self.warmup_steps = warmup_steps
        self.decay = decay
        self.advice = advice
        self._state = SkipState()

    @property
    def skipped(self) -> int:
        """Steps skipped since the run began."""
        return self._state.skipped

    @property
    def consecutive(self) -> int:
        """Steps skipped in a row, up to now."""
        return self._state.consecutive

    @property
    def mean_norm(self) -> float | None:
        """Bias-corrected running mean of the accepted gradient norms; None before the first."""
        if self._state.accepted == 0:
            return None
        return self._state.mean_sum / (1 - self.decay**self._state.accepted)

    def reason_to_skip(self, loss: float, grad_norm: float, last_checkpoint: str | None = None) -> str | None:
        """Decides about one step: None to take it, or why it must be skipped, in words for the log.

        loss, grad_norm: of this step, before clipping. last_checkpoint: how to name the last good checkpoint.
        Raises Diverged when `max_skipped_steps` steps in a row were not finite, this one included.
        """
        state = self._state
        reason = self._judge_finite(loss, grad_norm)
        state.not_finite = 0 if reason is None else state.not_finite + 1
        reason = reason or self._judge_norm(grad_norm)
        if reason is None:
            state.mean_sum = self.decay * state.mean_sum + (1 - self.decay) * grad_norm
            state.accepted += 1
            state.consecutive = 0
            return None
        state.skipped += 1
        state.consecutive += 1
        if state.not_finite >= self.max_skipped_steps:
            raise self.divergence(
                f"{state.not_finite} steps in a row were skipped, the last because {reason}", last_checkpoint
            )
        return reason

    def divergence(self, what: str, last_checkpoint: str | None) -> Diverged:
        """The error that ends a run because of `what`."""
        good = (
            "no good checkpoint was saved"
            if last_checkpoint is None
            else f"the last good checkpoint is {last_checkpoint}"
        )
        return Diverged(f"training diverged: {what}; {good}; {self.advice}")

    def state_dict(self) -> dict[str, float | int]:
        """Plain values; `load_state_dict` puts them back."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self._state = SkipState(**state)  # pyright: ignore[reportArgumentType]  # written by state_dict

    def _judge_finite(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        return None if math.isfinite(grad_norm) else f"the gradient norm is {grad_norm}"

    def _judge_norm(self, grad_norm: float) -> str | None:
        state, mean = self._state, self.mean_norm
        if mean is None or state.accepted < self.warmup_steps or grad_norm <= self.spike_factor * mean:
            return None
        if state.consecutive >= PATIENCE:
            state.mean_sum, state.accepted = 0.0, 0
            return None
        return f"the gradient norm {grad_norm:.3g} is {grad_norm / mean:.1f} × its running mean {mean:.3g}"
