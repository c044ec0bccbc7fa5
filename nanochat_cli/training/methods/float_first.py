"""Training that begins in float and ends ternary: which weights the layers multiply with at each step.

    w_used = w + λ · (ternary(w) − w),  x_used = x + λ · (int8(x) − x),  gradients straight through to w and x

λ is 0 for `model.quant.start` of the steps, rises by the same amount in every one of the next `model.quant.ramp`, and
is 1 from there on (arXiv:2502.11895 begins in float; the mixture is that of Hugging Face's 1.58-bit fine-tuning). With
0 the layers compute as float ones do, with 1 as ternary ones do, bit for bit. Latents and optimizer state go on.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanochat_cli.formats.open import TERNARY_SHARE
from nanochat_cli.model.bitlinear import Phase, requantize
from nanochat_cli.optim import Optimizers
from nanochat_cli.training.number_formats import head_backward
from nanochat_cli.training.part import Part, Setup
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.time_budget import CALIBRATION_STEPS


class FloatFirst(Part):
    """Moves the layers of a model, and of what trains beside it, from one phase to the next."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.quant, self.layers = setup.config.model.quant, list(setup.linears().values())
        self.share, self._steps = 1.0, 0
        """λ, and steps of this process."""
        self._share = torch.ones((), device=setup.device)
        self._phase: Phase = "ternary"
        self.provisional: str | None = None
        self._use(self.quant.ternary_share(0, setup.config.train.total_steps))

    def before_step(self, progress: Progress, optimizers: Optimizers) -> dict[str, float]:
        """λ never falls, so that a run which is given more steps does not return to float.

        It stands still while a time budget has not seen enough steps to know how many fit: what it assumes after a step
        that compiled is far too few.
        """
        before, self._steps = self._phase, self._steps + 1
        if progress.total_is_final or self._steps > CALIBRATION_STEPS:
            self._use(max(self.share, self.quant.ternary_share(progress.step, progress.total_steps)))
        if self._phase != before:
            how = "ternary" if self._phase == "ternary" else "on the way from float to ternary"
            self.setup.reporter.info(f"from step {progress.step + 1} on the layers are {how}")
            if progress.compiled:
                torch.compiler.reset()  # code of the phase before would count towards dynamo's limit
        return {}

    def metrics(self, progress: Progress) -> dict[str, Tensor]:
        return {"training/ternary_share": self._share}

    def values(self) -> dict[str, Any]:
        return {TERNARY_SHARE: self.share}

    def restore(self, tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        self._use(values.get(TERNARY_SHARE, 1.0))

    def _use(self, share: float) -> None:
        if share == self.share:
            return
        self.share = share
        self._share.fill_(share)
        phase: Phase = "float" if share == 0 else "ternary" if share == 1 else "ramp"
        if phase != self._phase:
            self._phase = phase
            self.provisional = {"float": "float weights", "ramp": "weights between float and ternary"}.get(phase)
            for layer in self.layers:
                layer.use_phase(phase, self._share)
            self.setup.score.backward = head_backward(self.layers)
        requantize(self.layers)
