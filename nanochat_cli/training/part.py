"""A part of training: a method or a measurement, and the moments of a run at which it may act.

The trainer, the update and the checkpoints know parts through this interface alone; `training.build` lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nanochat_cli.config.schema import Config
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import Optimizers
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.training.distributed.owned import Owned
from nanochat_cli.training.losses import TokenLoss
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.training_data import TrainingData


@dataclass
class Setup:
    """The arguments of every part. data: None where there is nothing to read.

    beside: modules that are trained beside the model, by the prefix of their names; a part with such a module adds it.
    """

    config: Config
    model: Transformer
    score: TokenLoss
    device: torch.device
    reporter: Reporter
    data: TrainingData | None = None
    beside: dict[str, nn.Module] = field(default_factory=dict)

    def linears(self) -> dict[str, BitLinear]:
        """`linears_of` these."""
        return linears_of(self.model, self.beside)


def linears_of(model: Transformer, beside: Mapping[str, nn.Module]) -> dict[str, BitLinear]:
    """Every linear layer of the blocks that is trained, by its dotted name. beside: modules by their prefix."""
    modules = [("", model), *((f"{prefix}.", module) for prefix, module in beside.items())]
    named = ((prefix + name, layer) for prefix, module in modules for name, layer in module.named_modules())
    return {name: layer for name, layer in named if isinstance(layer, BitLinear)}


@dataclass
class MicroBatch:
    """Some sequences of a global batch on their way to a loss.

    inputs, targets: int64 [B, T]; rows: which sequences of the batch; share: of its targets, 0-dim where sequences have
    different numbers of them. hidden: [B, T, C] after
    the final norm. A part may set the rest after the forward pass: counted, int64 [R] ascending, those of the B · T
    tokens whose loss counts (None: all); logits [B · T, V], if it has them; cross_entropy over all tokens, 0-dim, where
    not all count. metrics: 0-dim; the metric of a step is their mean weighted by `share`.
    """

    inputs: Tensor
    targets: Tensor
    rows: slice
    share: float | Tensor
    hidden: Tensor = field(init=False)
    counted: Tensor | None = None
    logits: Tensor | None = None
    cross_entropy: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Part:
    """A subclass overrides the hooks that it needs, here in the order of a run.

    `progress.step` is the number of steps that are done.
    """

    report: tuple[str, str] | None = None
    """Group of metrics (`group/…`) whose last values are a section of the run's report, and the section's title."""
    warmup_steps = 0
    """Steps before the part acts; `progress.warm_ups.filtering` says how many of them a short run has."""
    owned: Owned | None = None
    """What this rank owns of what is trained; None where one process does all. Known before the first hook."""
    backward_share: float | None = None
    """Share of the last step's tokens in its backward pass, of a part that leaves some out."""
    provisional: str | None = None
    """What the model is while it is not yet the one that is trained for: evaluations say so and are never the best."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def start(self, progress: Progress) -> None:
        """Before the first step of a run; not when it is resumed."""

    def changes_latents(self, progress: Progress) -> bool:
        """Whether `before_step` may read or change latents now, which a rank has of its own matrices only."""
        return False

    def counters(self) -> list[Tensor]:
        """What micro-batches add to, beside gradients and metrics: float32 counts, which several ranks add up."""
        return []

    def before_step(self, progress: Progress, optimizers: Optimizers) -> dict[str, float]:
        """Between two steps: weights and optimizer state may change. Returns metrics of the next step."""
        return {}

    def begin(self, progress: Progress) -> None:
        """Before the first micro-batch; once more when memory ran out and the batch starts again."""

    def before_forward(self, micro: MicroBatch) -> None:
        """The model is about to read `micro`."""

    def after_forward(self, micro: MicroBatch) -> None:
        """`micro.hidden` is known, its loss is not."""

    def add_loss(self, micro: MicroBatch, objective: Tensor, counted: Tensor) -> Tensor:
        """The objective with this part's term, 0-dim. counted: cross-entropy of the tokens that count."""
        return objective

    def end(self, *, failed: bool) -> None:
        """After the last backward pass. failed: there was an error, and the gradient is void."""

    def metrics(self, progress: Progress) -> dict[str, Tensor]:
        """Metrics of the step whose gradient is known, 0-dim on the device: read together with the loss."""
        return {}

    def after_step(self, progress: Progress, metrics: Mapping[str, float], *, taken: bool) -> None:
        """The step was taken or skipped; `progress` does not count it yet."""

    def observe(self, progress: Progress) -> dict[str, float]:
        """After a step that `progress` counts: measurements of the model, which are logged at once."""
        return {}

    def tensors(self) -> dict[str, Any]:
        """Trees of tensors for a checkpoint, by the name of their file."""
        return {}

    def values(self) -> dict[str, Any]:
        """Plain values for `state.json`, by their key."""
        return {}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Continue from the tensors and values of a checkpoint, those of all parts."""
