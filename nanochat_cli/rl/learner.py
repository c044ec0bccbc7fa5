"""The model that learns from rewards: what it is trained on is a loss of completions, the rest is `training`.

Ternary QAT as in pre-training: the forward pass uses the quantised weights, the optimizer moves the latents, and
`update` quantises once. Experts are chosen as in inference: no balance loss, no capacity.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.rl.grpo_loss import token_log_probabilities
from nanochat_cli.rl.trajectories import Batch
from nanochat_cli.training.build import METHODS, Methods, build_state
from nanochat_cli.training.devices import choose_device
from nanochat_cli.training.health.ternary import TernaryHealth
from nanochat_cli.training.skip_policy import SkipPolicy
from nanochat_cli.training.state import TrainState
from nanochat_cli.training.update import Loss, Metrics, gradient, read, step


class Objective(Protocol):
    """A loss that adds up over the parts of a batch, and its metrics: means over the tokens of the part."""

    temperature: float

    def divisor(self, batch: Batch) -> Tensor: ...
    def __call__(self, log_probabilities: Tensor, part: Batch, divisor: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


class Learner:
    """The model of a GRPO run, and what trains it."""

    def __init__(self, model: Transformer, config: Config, reporter: Reporter) -> None:
        grpo, train = config.grpo, config.train
        changes = {
            "optim": config.optim.model_copy(update={"schedule": "constant", "warmup_steps": 0}),
            "telemetry": config.telemetry.model_copy(update={"interval": 1}),
        }
        methods: Methods = {TernaryHealth: METHODS[TernaryHealth]}
        self.state = build_state(
            config.model_copy(update=changes), choose_device(train.device), reporter, model=model, methods=methods
        )
        for _, moe in model.mixtures():
            moe.eval()
        self.state.optimizers.lr_factor = grpo.lr_factor
        # Only what is not finite: the norm depends on how many answers of a batch differ, so a spike is not an error.
        self.state.skip_policy = SkipPolicy(math.inf, train.max_skipped_steps, advice="lower grpo.lr_factor")
        self.state.progress.total_steps = grpo.updates * grpo.rounds
        self.state.unit, self.state.to_save_memory = "update", "grpo.max_tokens or grpo.shots"

    @property
    def model(self) -> Transformer:
        return self.state.model

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return self.state.progress.step

    def gradient(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """The gradient of a batch in the parameters, and its loss and metrics. Nothing is updated."""
        loss = completion_loss(self.state, batch.to(self.model.device), objective)
        return read(gradient(self.state, len(batch.mask), loss))

    def update(self, loss: float) -> dict[str, float]:
        """Move the latents along the gradient and quantise them, unless the loss or the gradient is not finite."""
        values = step(self.state, {"loss/objective": torch.tensor(loss, device=self.model.device)})
        if self.state.is_good:
            self.state.progress.step += 1
        return {"training/grad_norm": values["training/grad_norm"]}

    def saved(self, checkpoint: str) -> bool:
        """A checkpoint has that name now; returns whether it is good."""
        if self.state.is_good:
            self.state.last_good = checkpoint
        return self.state.is_good

    def discard(self) -> None:
        """Forget the gradient."""
        self.state.optimizers.zero_grad()

    def ternary_statistics(self) -> dict[str, float]:
        """Flips since the last call, zeros, margins; nothing for a float model."""
        return self.state.observe()

    def values(self) -> dict[str, Any]:
        """Plain values for a checkpoint, beside the tensors of `state`."""
        progress = self.state.progress
        skip_policy = self.state.skip_policy.state_dict()
        return {"updates": progress.step, "micro_batch": progress.micro_batch, "skip_policy": skip_policy}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """Continue from the tensors of `state` and from what `values` returned."""
        self.state.restore(tensors, values)
        self.state.progress.step, self.state.progress.micro_batch = values["updates"], values["micro_batch"]


def completion_loss(state: TrainState, batch: Batch, objective: Objective) -> Loss:
    """An objective over the completions of a batch, for `update`."""
    divisor, tokens = objective.divisor(batch), batch.mask.sum()

    def loss(rows: slice) -> tuple[Tensor, Metrics]:
        part = batch.rows(rows.start, rows.stop)
        log_probabilities = completion_log_probabilities(
            state.model, part, objective.temperature, state.score.autocast_dtype
        )
        value, metrics = objective(log_probabilities, part, divisor)
        share = part.mask.sum() / tokens
        return value, {name: one * share for name, one in metrics.items()} | {"loss/objective": value.detach()}

    return loss


def completion_log_probabilities(
    model: Transformer, batch: Batch, temperature: float, autocast_dtype: torch.dtype | None = None
) -> Tensor:
    """Log-probability of every token of the completions under softmax(logits / temperature); 0 elsewhere.

    float32 [B, T]. Logits exist for those tokens alone.
    """
    enabled = autocast_dtype is not None
    with torch.autocast(batch.inputs.device.type, dtype=autocast_dtype or torch.bfloat16, enabled=enabled):
        hidden = model(batch.inputs)[batch.mask]
        logits = model.logits(hidden)
    found = token_log_probabilities(logits[None], batch.targets[batch.mask][None], temperature)
    zeros = torch.zeros(batch.mask.shape, dtype=found.dtype, device=found.device)
    return zeros.masked_scatter(batch.mask, found)
