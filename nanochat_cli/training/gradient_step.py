"""One global batch: forward and backward over its micro-batches, and what to do when memory runs out.

The global batch never changes. When a micro-batch does not fit, it is halved and the accumulation doubled, the
batch is started again, and the run says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.config.schema import TrainConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.model.mtp import MTP, shifted_targets
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.losses import LossOptions, chunked_cross_entropy


@dataclass(frozen=True)
class BatchLoss:
    """objective: what was minimised; cross_entropy: nats per token, the headline. 0-dim float32, on the device.

    ahead: cross-entropy of each token further ahead, of multi-token prediction; [0] without it.
    """

    objective: Tensor
    cross_entropy: Tensor
    ahead: Tensor


def is_out_of_memory(error: BaseException) -> bool:
    """True for CUDA's out-of-memory error and for the CPU allocator's plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


class GradientStep:
    """Accumulates the gradient of a global batch into the parameters' `.grad`."""

    def __init__(
        self,
        model: Transformer,
        config: TrainConfig,
        autocast_dtype: torch.dtype | None,
        warn: Callable[[str], None],
        mtp: MTP | None = None,
    ) -> None:
        self.model = model
        self.mtp = mtp
        self.progress = 0.0
        """Share of the run that is done, for weights that depend on it."""
        self.micro_batch = config.batch_size
        self.chunk = config.loss_chunk
        self.options = LossOptions(config.label_smoothing, config.z_loss, config.entropy_weight)
        self.autocast_dtype = autocast_dtype
        self.warn = warn
        self.device = next(model.parameters()).device

    def __call__(self, inputs: Tensor, targets: Tensor, zero_grad: Callable[[], None]) -> BatchLoss:
        """inputs, targets: int64 [B, T], the whole global batch, on the device. Gradients start from zero."""
        while True:
            zero_grad()
            try:
                return self._accumulate(inputs, targets)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error)

    def _accumulate(self, inputs: Tensor, targets: Tensor) -> BatchLoss:
        total = inputs.shape[0]
        objective = torch.zeros((), device=self.device)
        cross_entropy = torch.zeros((), device=self.device)
        ahead = torch.zeros(0 if self.mtp is None else self.mtp.n_tokens, device=self.device)
        for start in range(0, total, self.micro_batch):
            rows = slice(start, min(start + self.micro_batch, total))
            share = (rows.stop - rows.start) / total
            for _, moe in self.model.mixtures():
                moe.loss_scale.fill_(share)
            part = self._forward(inputs[rows], targets[rows])
            (part.objective * share).backward()
            objective += part.objective.detach() * share
            cross_entropy += part.cross_entropy * share
            ahead += part.ahead * share
        return BatchLoss(objective, cross_entropy, ahead)

    def _forward(self, inputs: Tensor, targets: Tensor) -> BatchLoss:
        enabled = self.autocast_dtype is not None
        with torch.autocast(self.device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            hidden = self.model(inputs)
            ahead = [] if self.mtp is None else self.mtp.hidden_states(self.model, hidden, targets)
        objective, cross_entropy = self._loss(hidden, targets)
        reported = []
        if self.mtp is not None:
            for i, (states, weight) in enumerate(zip(ahead, self.mtp.weights(self.progress), strict=True)):
                auxiliary, plain = self._loss(states, shifted_targets(targets, i + 1))
                objective = objective + weight * auxiliary
                reported.append(plain)
        return BatchLoss(objective, cross_entropy, torch.stack(reported) if reported else cross_entropy.new_zeros(0))

    def _loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Objective and cross-entropy of hidden [B, T, C]."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if self.autocast_dtype is not None:
            flat = flat.to(self.autocast_dtype)
        return chunked_cross_entropy(flat, self.model.unembedding, targets.reshape(-1), self.chunk, self.options)

    def _halve(self, error: BaseException) -> None:
        if self.micro_batch == 1:
            raise ConfigError(
                "out of memory with one sequence per micro-batch; lower train.seq_len or the model, "
                "or set train.gradient_checkpointing = true"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        before = self.micro_batch
        self.micro_batch = max(1, before // 2)
        self.warn(f"out of memory: micro-batch {before} → {self.micro_batch}, the global batch stays the same")
