"""Batches on the device. On a CUDA device the next one is copied while a step computes, if it has been read ahead.

Knows CUDA streams and pinned memory.
"""

import torch

from nanochat_cli.training.training_data import Batch, TrainingData


class Staging:
    """`data`'s batches on `device`, the same values in the same order."""

    def __init__(self, data: TrainingData, device: torch.device) -> None:
        self.data, self.device = data, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, Batch] | None = None

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, int64 [B, T]."""
        if self._stream is None:
            inputs, targets = self.data.batch(step)
            return inputs.to(self.device), targets.to(self.device)
        ahead = self._ahead if self._ahead is not None and self._ahead[0] == step else None
        _, batch = ahead or self._copy(step, self._stream)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in batch:
            tensor.record_stream(current)  # allocated on the other stream: not to be reused before this one is done
        self._ahead = self._copy(step + 1, self._stream) if self.data.is_ready(step + 1) else None
        return batch

    def _copy(self, step: int, stream: torch.cuda.Stream) -> tuple[int, Batch]:
        inputs, targets = (tensor.pin_memory() for tensor in self.data.batch(step))
        with torch.cuda.stream(stream):
            batch = inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
        return step, batch
