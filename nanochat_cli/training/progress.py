"""Training progress, and the final result."""

from dataclasses import dataclass, field

from nanochat_cli.model.attend import AttentionForm
from nanochat_cli.optim.newton_schulz import NumberFormat
from nanochat_cli.optim.schedules import WarmUps
from nanochat_cli.training.bits_per_byte import HeldOut
from nanochat_kernels import Backward


@dataclass
class Progress:
    """How far a run has come; all of it is in the checkpoint. step: steps done; seconds: spent in steps.

    excess_seconds: seconds that a time budget does not count. warm_ups: None in checkpoints of older versions.
    """

    total_steps: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    excess_seconds: float = 0.0
    flops: float = 0.0
    warm_ups: WarmUps | None = None
    total_is_final: bool = True
    compiled: bool = False
    backward: Backward = "exact"
    """Number format of the ternary layers' gradients."""
    iteration: NumberFormat | None = None
    """Number format of Muon's iteration; None: that of the device."""
    attention: AttentionForm = "torch"
    """Form of causal attention in training."""
    micro_batch: int = 0
    best_bits_per_byte: float | None = None
    best_step: int | None = None
    final_step: int | None = None
    good_step: int | None = None
    """Step of the last checkpoint that was saved while no steps were being skipped."""
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @property
    def known_total(self) -> int | None:
        """The total that the learning rate decays by; None while a time budget still decides."""
        return self.total_steps if self.total_is_final else None


@dataclass(frozen=True)
class TrainResult:
    """progress, skipped: at the end. held_out: over all held-out tokens, or eval.final_max_tokens of them."""

    progress: Progress
    held_out: HeldOut
    skipped: int
    tokens_per_second: float
    utilisation: float
    peak_flops: float
    parameters: int
    optimizer_bytes: int
