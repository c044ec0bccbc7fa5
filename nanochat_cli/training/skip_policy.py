"""Which optimizer steps are skipped: those whose loss or gradient norm is not finite, or whose norm spikes.

Knows two numbers per step and keeps a running mean of the norms it accepted; skipping the step itself is the
trainer's affair. The state is a plain dictionary and belongs into the checkpoint, since decisions depend on it.
"""

import math
from dataclasses import asdict, dataclass

from nanochat_cli.errors import Diverged


@dataclass
class SkipState:
    """What the next decision depends on."""

    mean_sum: float = 0.0  # exponential sum of the accepted norms, before bias correction
    accepted: int = 0
    skipped: int = 0
    consecutive: int = 0


class SkipPolicy:
    """Skips non-finite steps, and steps whose gradient norm exceeds `spike_factor` × its running mean.

    The mean is an exponential moving average with bias correction (as of Adam's moments, arXiv:1412.6980), `decay`
    per accepted step; skipped steps do not enter it. For the first `warmup_steps` accepted steps only non-finite ones
    are skipped, since norms fall fast at the start.
    """

    def __init__(
        self, spike_factor: float, max_skipped_steps: int, *, warmup_steps: int = 20, decay: float = 0.98
    ) -> None:
        self.spike_factor = spike_factor
        self.max_skipped_steps = max_skipped_steps
        self.warmup_steps = warmup_steps
        self.decay = decay
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
        Raises Diverged when `max_skipped_steps` steps in a row have been skipped, this one included.
        """
        state = self._state
        reason = self._judge(loss, grad_norm)
        if reason is None:
            state.mean_sum = self.decay * state.mean_sum + (1 - self.decay) * grad_norm
            state.accepted += 1
            state.consecutive = 0
            return None
        state.skipped += 1
        state.consecutive += 1
        if state.consecutive >= self.max_skipped_steps:
            good = (
                "no checkpoint was saved"
                if last_checkpoint is None
                else f"the last good checkpoint is {last_checkpoint}"
            )
            raise Diverged(
                f"training diverged: {state.consecutive} steps in a row were skipped, the last because {reason}; "
                f"{good}; lower optim.lr, or raise train.spike_factor if the loss was still falling"
            )
        return reason

    def state_dict(self) -> dict[str, float | int]:
        """Plain values; `load_state_dict` puts them back."""
        return asdict(self._state)

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        self._state = SkipState(**state)  # pyright: ignore[reportArgumentType]  # written by state_dict

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm}"
        mean = self.mean_norm
        if mean is not None and self._state.accepted >= self.warmup_steps and grad_norm > self.spike_factor * mean:
            return f"the gradient norm {grad_norm:.3g} is {grad_norm / mean:.1f} × its running mean {mean:.3g}"
        return None
