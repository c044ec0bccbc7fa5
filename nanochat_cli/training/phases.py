"""How long the parts of a training step take: forward, backward, optimizer.

Knows clocks and names. On a CPU the clock is read at both ends of a part; on a CUDA device an event is recorded
there, and events are read once their step is over, so that the host never waits. The loss and the gradient of the
head are computed chunk by chunk in one pass: they count as forward.
"""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")

_Events = tuple[Phase, torch.cuda.Event, torch.cuda.Event]


class Phases:
    """`with phases("forward"): ...`, as often as one likes in a step. This one measures nothing."""

    def __call__(self, phase: Phase) -> AbstractContextManager[None]:
        """What is done inside counts as this phase."""
        return nullcontext()

    def end_step(self) -> None:
        """The step is over."""

    def read(self) -> dict[str, float]:
        """`time/forward_ms` and so on: mean of the steps since the last reading; nothing before the first step."""
        return {}


class CPUPhases(Phases):
    """Reads the clock."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def end_step(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        found = _means({phase: 1e3 * seconds for phase, seconds in self._seconds.items()}, self._steps)
        self._steps, self._seconds = 0, dict.fromkeys(PHASES, 0.0)
        return found


class CUDAPhases(Phases):
    """Records events on the current stream. The last step is read with those after it: it may still be running."""

    def __init__(self) -> None:
        self._steps: list[list[_Events]] = []
        self._current: list[_Events] = []

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        try:
            yield
        finally:
            end.record()
            self._current.append((phase, start, end))

    def end_step(self) -> None:
        self._steps.append(self._current)
        self._current = []

    def read(self) -> dict[str, float]:
        *over, last = self._steps or [[]]
        total: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        for phase, start, end in (events for step in over for events in step):
            total[phase] += start.elapsed_time(end)
        self._steps = [last] if last else []
        return _means(total, len(over))


def _means(total: dict[Phase, float], steps: int) -> dict[str, float]:
    return {f"time/{phase}_ms": milliseconds / steps for phase, milliseconds in total.items()} if steps else {}


def make_phases(enabled: bool, device: torch.device) -> Phases:
    """The clock of a device; not enabled: one that measures nothing."""
    if not enabled:
        return Phases()
    return CUDAPhases() if device.type == "cuda" else CPUPhases()
