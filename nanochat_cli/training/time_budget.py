"""How many steps fit a time budget.

The number is estimated anew after every step while the schedule does not depend on it yet (warm-up and the flat
part of WSD), and then frozen, so that the decay ends where the budget ends. Once frozen it is part of the state
of a run, and a resumed run takes the same steps.
"""

import statistics
from collections import deque

from nanochat_cli.config.schema import OptimConfig

CALIBRATION_STEPS = 8
WINDOW = 64


class TimeBudget:
    """Turns measured step times into a total. budget: seconds of training steps, compilation included.

    The first CALIBRATION_STEPS steps are always taken: a budget that is eaten by compilation still trains a little.
    """

    def __init__(self, budget: float, config: OptimConfig, max_steps: int) -> None:
        self.budget = budget
        self.config = config
        self.max_steps = max_steps
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def total_steps(self, step: int, elapsed: float, last_step_seconds: float) -> int:
        """The total that fits, after `step` steps that took `elapsed` seconds, the last of them `last_step_seconds`."""
        self._recent.append(last_step_seconds)
        remaining = max(0.0, self.budget - elapsed)
        fitting = step + int(remaining / max(statistics.median(self._recent), 1e-6))
        return min(self.max_steps, max(step, fitting, CALIBRATION_STEPS))

    def must_freeze(self, step: int, total_steps: int) -> bool:
        """Whether the learning rate of the next step depends on the total."""
        if step < max(CALIBRATION_STEPS, self.config.warmup_steps):
            return False
        if self.config.schedule == "constant":
            return False
        return self.config.schedule != "wsd" or step >= self.config.stable_ratio * total_steps
