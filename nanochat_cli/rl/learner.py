"""The model that learns: one gradient at a time, with the training machinery of `training` and `optim`.

Ternary QAT as in training: the forward pass uses the quantised weights, the optimizer moves the latents, and `update`
quantises once. What is minimised is an argument. Experts are chosen as in inference: no balance loss, no capacity.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.report.quantities import counted
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.rl.grpo_loss import token_log_probabilities
from nanochat_cli.rl.trajectories import Batch
from nanochat_cli.training.devices import choose_autocast, choose_device, require_float8
from nanochat_cli.training.gradient_step import is_out_of_memory
from nanochat_cli.training.skip_policy import SkipPolicy
from nanochat_cli.training.telemetry import TernaryTelemetry


class Objective(Protocol):
    """A loss that adds up over the parts of a batch, and its metrics: means over the tokens of the part."""

    temperature: float

    def divisor(self, batch: Batch) -> Tensor: ...
    def __call__(self, log_probabilities: Tensor, part: Batch, divisor: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


class Learner:
    """Owns the model's latents, the optimizers' state and what guards them."""

    def __init__(self, model: Transformer, config: Config, reporter: Reporter) -> None:
        self.device = choose_device(config.train.device)
        require_float8(config.train.grad_input, self.device)
        self.autocast_dtype = choose_autocast(config.train.dtype, self.device)
        self.model = model.to(self.device).train()
        self.model.gradient_checkpointing = config.train.gradient_checkpointing
        self.model.use_forms(None if config.train.forward == "auto" else config.train.forward)
        for _, layer in self.model.ternary_layers():
            layer.grad_input = config.train.grad_input
        for _, moe in self.model.mixtures():
            moe.eval()
        optim = config.optim.model_copy(update={"schedule": "constant", "warmup_steps": 0})
        self.optimizers = build_optimizer(self.model, optim)
        self.optimizers.lr_factor = config.grpo.lr_factor
        # Only what is not finite: the norm hangs on how many answers of a batch differ, so that spikes are no fault.
        self.skip_policy = SkipPolicy(math.inf, config.train.max_skipped_steps, advice="lower grpo.lr_factor")
        self.last_good: str | None = None
        """The last checkpoint that was saved after an update that was taken."""
        self.telemetry = TernaryTelemetry()
        self.updates = 0
        """Optimizer steps taken."""
        self.micro_batch = config.train.batch_size
        self._grad_clip = config.train.grad_clip
        self._total = config.grpo.updates * config.grpo.rounds
        self._reporter = reporter

    def gradient(self, batch: Batch, objective: Objective) -> dict[str, float]:
        """The gradient of a batch into the parameters; its loss and metrics. Nothing is updated."""
        while True:
            self.optimizers.zero_grad()
            try:
                return self._accumulate(batch.to(self.device), objective)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch == 1:
                    raise ConfigError(
                        "out of memory with one completion at a time: lower grpo.max_tokens or grpo.shots, "
                        "or set train.gradient_checkpointing = true"
                    ) from error
                self.micro_batch = max(1, self.micro_batch // 2)
                self._reporter.warn(f"out of memory: {counted(self.micro_batch, 'completion')} at a time from here on")

    def update(self, loss: float) -> dict[str, float]:
        """Move the latents along the gradient and quantise them, or skip a gradient that is no good."""
        norm = float(self.optimizers.clip_grad_norm(self._grad_clip))
        reason = self.skip_policy.reason_to_skip(loss, norm, self.last_good)
        if reason is None:
            self.optimizers.step(self.updates, self._total)
            self.model.requantize()
            self.updates += 1
        else:
            self._reporter.info(f"update {self.updates + 1} skipped: {reason}")
        self.optimizers.zero_grad()
        return {"training/grad_norm": norm}

    def saved(self, checkpoint: str) -> bool:
        """A checkpoint of `tensors` and `state` has that name now; returns whether it is good."""
        good = self.skip_policy.consecutive == 0
        if good:
            self.last_good = checkpoint
        return good

    def discard(self) -> None:
        """Forget the gradient."""
        self.optimizers.zero_grad()

    def ternary_statistics(self) -> dict[str, float]:
        """Flips since the last call, zeros, margins; nothing of a float model."""
        layers = []
        for name, layer in self.model.ternary_layers():
            ternary = layer.ternary()
            layers.append((name, ternary.codes, layer.weight.detach(), ternary.scales))
        return self.telemetry.measure(layers)[0].scalars() if layers else {}

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizers.state_dict(),
            "telemetry": self.telemetry.state_dict(),
        }

    def state(self) -> dict[str, Any]:
        return {
            "updates": self.updates,
            "micro_batch": self.micro_batch,
            "skip_policy": self.skip_policy.state_dict(),
        }

    def restore(self, tensors: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Continue from what `tensors` and `state` returned; the model has its weights already."""
        self.optimizers.load_state_dict(tensors["optimizer"])
        self.telemetry.load_state_dict(tensors["telemetry"], self.device)
        self.updates, self.micro_batch = state["updates"], state["micro_batch"]
        self.skip_policy.load_state_dict(state["skip_policy"])

    def _accumulate(self, batch: Batch, objective: Objective) -> dict[str, float]:
        divisor = objective.divisor(batch)
        tokens = batch.mask.sum()
        sums: dict[str, Tensor] = {}
        for start in range(0, len(batch.mask), self.micro_batch):
            part = batch.rows(start, start + self.micro_batch)
            log_probabilities = completion_log_probabilities(
                self.model, part, objective.temperature, self.autocast_dtype
            )
            loss, metrics = objective(log_probabilities, part, divisor)
            loss.backward()
            share = part.mask.sum() / tokens
            weighted = {name: value * share for name, value in metrics.items()} | {"loss/objective": loss.detach()}
            for name, value in weighted.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
        values = torch.stack([value.float() for value in sums.values()]).tolist()
        return dict(zip(sums, values, strict=True))


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
