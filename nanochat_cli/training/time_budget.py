"""How many steps fit a time budget.

The number is re-estimated after every step while the schedule does not depend on it yet (warm-up and the flat part of
WSD), and then frozen, so that the decay ends where the budget ends. Once frozen it is part of the state of a run, and a
resumed run takes the same steps.

No single step may use up the budget: if the machine was suspended or the process stopped, only a share of the budget is
charged. A schedule that decays always has a last part of the run to decay in.
"""

import statistics
from collections import deque

from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.optim.schedules import WarmUps
from nanochat_cli.training.progress import Progress

LEAST_STEPS = 8
CALIBRATION_STEPS = 6
"""Steps that are timed before the total is frozen, unless train.total_steps bounds it."""
WINDOW = 64
STEP_SHARE = 0.25
"""Largest share of the budget that one step is charged."""
REST_SHARE = 0.25
"""Smallest share of the run that is left when the total is frozen."""


class TimeBudget:
    """Turns measured step times into a total. budget: seconds of training steps, compilation included.

    The first LEAST_STEPS steps are always taken: even if compilation uses up the budget, something is trained.
    """

    def __init__(self, budget: float, config: OptimConfig, max_steps: int) -> None:
        self.budget = budget
        self.config = config
        self.max_steps = max_steps
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._used_up = False
        rest = 1 - config.stable_ratio if config.schedule == "wsd" else REST_SHARE
        self._rest = 0.0 if config.schedule == "constant" else min(REST_SHARE, rest)

    def fit(self, progress: Progress, asked: WarmUps, last_step_seconds: float) -> None:
        """Set the total and the warm-ups that fit, and whether they are final. `progress` counts the last step already.

        asked: the warm-ups of the configuration.
        """
        progress.excess_seconds += self.excess(last_step_seconds)
        counted = progress.seconds - progress.excess_seconds
        progress.total_steps = self.total_steps(progress.step, counted, last_step_seconds)
        past = progress.warm_ups or asked
        if len(self._recent) > 1:  # the first step of a process may compile
            progress.warm_ups = past = asked.within(progress.total_steps).after(progress.step, past)
        progress.total_is_final = self.must_freeze(progress.step, progress.total_steps, past.rate)

    def excess(self, seconds: float) -> float:
        """Seconds of a step beyond what is charged for it."""
        return max(0.0, seconds - STEP_SHARE * self.budget)

    def total_steps(self, step: int, elapsed: float, last_step_seconds: float) -> int:
        """The total that fits, after `step` steps that took `elapsed` seconds, the last of them `last_step_seconds`.

        elapsed: without what was in excess.
        """
        self._recent.append(last_step_seconds - self.excess(last_step_seconds))
        timed = [*self._recent]
        remaining = max(0.0, self.budget - elapsed)
        fitting = step + int(remaining / max(statistics.median_low(timed[1:] or timed), 1e-6))
        least = max(LEAST_STEPS, -int(-step // (1 - self._rest)))
        if remaining and len(timed) < CALIBRATION_STEPS:
            least = max(least, step + 1)
        self._used_up = fitting <= least
        return min(self.max_steps, max(fitting, least))

    def must_freeze(self, step: int, total_steps: int, warm_up: float) -> bool:
        """Whether the learning rate of the next step depends on the total. warm_up: steps of it in this run."""
        bounded = total_steps == self.max_steps
        if not self._rest or step < warm_up or (len(self._recent) < CALIBRATION_STEPS and not bounded):
            return False
        if self.config.schedule != "wsd" or (self._used_up and not bounded):
            return True
        return step >= self.config.stable_ratio * total_steps
