"""The state of a training: all that the next step depends on, into a checkpoint and back out of one."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import Optimizers
from nanochat_cli.report.reporter import QuietReporter, Reporter
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.losses import TokenLoss
from nanochat_cli.training.part import Part
from nanochat_cli.training.phases import Phases
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.skip_policy import SkipPolicy


@dataclass
class TrainState:
    """What `update` works on: what is saved first, then what the configuration fixes, then how it reports."""

    model: Transformer
    linears: Mapping[str, BitLinear]
    """Every linear layer that is trained, by its dotted name, beside the model's too."""
    optimizers: Optimizers
    """With the schedule of the learning rates, a function of `progress`. Random numbers are torch's own."""
    skip_policy: SkipPolicy
    progress: Progress
    parts: list[Part]
    """Methods and measurements, in the order in which their hooks run."""

    score: TokenLoss
    owned: Owned | None = None
    """What this rank computes and owns; None where one process does all."""
    grad_clip: float = 1.0

    last_good: str | None = None
    """Name of the last checkpoint that was saved while no steps were being skipped."""
    reporter: Reporter = field(default_factory=QuietReporter)
    phases: Phases = field(default_factory=Phases)
    unit: str = "step"
    """The word for an update in messages."""
    to_save_memory: str = "train.seq_len or the model"
    """Settings to lower when a single row does not fit."""

    @property
    def is_good(self) -> bool:
        """The last step was not skipped."""
        return self.skip_policy.consecutive == 0

    @property
    def provisional(self) -> str | None:
        """What the model is while it is not yet the one that is trained for."""
        return next((part.provisional for part in self.parts if part.provisional is not None), None)

    @property
    def backward_share(self) -> float | None:
        """Share of the last step's tokens in its backward pass; None where no part left any out."""
        shares = [part.backward_share for part in self.parts if part.backward_share is not None]
        return shares[-1] if shares else None

    def before_step(self) -> dict[str, float]:
        """Let the parts act between two steps, with the latents of all ranks where they need them; their metrics."""
        owned = self.owned if any(part.changes_latents(self.progress) for part in self.parts) else None
        if owned is not None:
            owned.fetch_latents()
        metrics: dict[str, float] = {}
        for part in self.parts:
            metrics |= part.before_step(self.progress, self.optimizers)
        if owned is not None:
            owned.publish()
        return metrics

    def observe(self) -> dict[str, float]:
        """What the parts measure after a step."""
        observed: dict[str, float] = {}
        for part in self.parts:
            observed |= part.observe(self.progress)
        return observed

    def tensors(self) -> dict[str, Any]:
        """The tensors of a checkpoint, by the name of their file; of several ranks those that this one writes."""
        tensors: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizers.state_dict()}
        for part in self.parts:
            tensors |= part.tensors()
        tensors["random"] = checkpoints.rng_state()
        return tensors if self.owned is None else self.owned.share_of(tensors)

    def values(self) -> dict[str, Any]:
        """The plain values of a checkpoint, in `state.json`."""
        values = {"progress": asdict(self.progress), "skip_policy": self.skip_policy.state_dict()}
        for part in self.parts:
            values |= part.values()
        return values

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `values` returned, except for the progress: the caller says what may change.

        Raises DataError for the state of other optimizers.
        """
        self.model.load_state_dict(tensors["model"])
        self.model.requantize()
        for part in self.parts:
            part.restore(tensors, values)
        states = tensors["optimizer"]
        self.optimizers.load_state_dict(states if self.owned is None else self.owned.own_state(states))
        self.skip_policy.load_state_dict(values["skip_policy"])
        checkpoints.restore_rng_state(tensors["random"])
