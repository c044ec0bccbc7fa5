"""The view of a training run: a panel that stays in place on a terminal, or a plain line per log interval elsewhere.

Knows the numbers that it is given and a clock; the trainer measures them. `update` only stores values: a thread of
Rich draws the panel twice a second, so the training loop does not wait for the terminal.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import TracebackType
from typing import TYPE_CHECKING

from nanochat_cli.report.quantities import format_duration, format_quantity
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.text_plot import sparkline

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

REFRESHES_PER_SECOND = 2
LONGEST_SILENCE = 30.0
"""Off a terminal, a step gets a line after so many seconds without one, whatever the log interval."""
TRAINING = "training"
PHASE_LINE_AFTER, PHASE_LINE_EVERY = 2.0, 10.0
"""Off a terminal, seconds until a phase other than training gets a line, and between two such lines."""
HISTORY = 256
"""Points kept of the loss curve; older ones are averaged in pairs."""


def start_live(reporter: Reporter, render: "Callable[[], RenderableType]") -> "Live | None":
    """Keep what `render` returns in place on the reporter's terminal until `stop`; None without a terminal."""
    console: Console | None = getattr(reporter, "console", None)
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        return None
    from rich.live import Live

    live = Live(get_renderable=render, console=console, refresh_per_second=REFRESHES_PER_SECOND)
    live.start(refresh=True)
    return live


@dataclass
class Readings:
    """The last known value of everything that is shown; None: not known yet."""

    loss: float | None = None
    """Training loss, nats per token."""
    eval_loss: float | None = None
    bits_per_byte: float | None = None
    eval_scope: str | None = None
    """Which held-out documents the evaluation has read: a sample, or all."""
    tokens_per_second: float | None = None
    utilisation: float | None = None
    """Model FLOP/s over the measured peak, 0 to 1."""
    data_wait_ms: float | None = None
    """Wait for a batch, per step."""
    lr: float | None = None
    grad_norm: float | None = None
    skipped: int = 0
    kept_share: float | None = None
    """Share of the tokens in the backward pass; None without token filtering."""


class LossHistory:
    """A curve of bounded length: when it is full, neighbours are averaged and every point covers twice as many."""

    def __init__(self, capacity: int = HISTORY) -> None:
        self.values: list[float] = []
        self._capacity = capacity
        self._stride = 1
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """Append a value, if it is finite."""
        if not math.isfinite(value):
            return
        self._pending.append(value)
        if len(self._pending) < self._stride:
            return
        values = [*self.values, sum(self._pending) / len(self._pending)]
        self._pending.clear()
        if len(values) >= self._capacity:
            values = [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=False)]
            self._stride *= 2
        self.values = values  # replaced, never changed in place: the drawing thread may be reading it


class LiveView:
    """`with LiveView(reporter, total_steps=1000, log_interval=10) as view: view.update(1, loss=9.1)`

    A panel if the reporter has a console that is a terminal; otherwise one line through `reporter.info` per
    `log_interval` steps and per evaluation. `total_steps` may be changed while it runs. `clock` returns seconds.
    """

    def __init__(
        self,
        reporter: Reporter,
        total_steps: int,
        log_interval: int,
        *,
        title: str = "training",
        peak_flops: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self._reporter = reporter
        self._log_interval = log_interval
        self._title = title
        self._peak_flops = peak_flops
        self._clock = clock
        self._started = clock()
        self._step = 0
        self._first: tuple[int, float] | None = None
        self._last_line, self._last_line_at = -1, self._started
        self._readings = Readings()
        self._history = LossHistory()
        self._live: Live | None = None
        self._phase, self._done, self._of = TRAINING, 0, 0
        self._phase_started = self._phase_line = self._started

    def __enter__(self) -> "LiveView":
        self._started = self._clock()
        self._live = start_live(self._reporter, self.panel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, **readings: float | str | None) -> None:
        """The run has done `step` steps; readings are fields of `Readings`, and None leaves a value as it is.

        Raises TypeError for a name that is not shown.
        """
        if self._first is None:
            # The first step compiles and warms up; the rate that the ETA uses starts after it.
            self._first = step, self._clock()
        self._step = step
        for name, value in readings.items():
            if name not in _NAMES:
                raise TypeError(f"the live view shows {', '.join(_NAMES)}, not {name!r}")
            if value is not None:
                setattr(self._readings, name, value)
        if isinstance(loss := readings.get("loss"), float):
            self._history.add(loss)
        if self._live is None:
            self._print_lines(step, evaluated=readings.get("bits_per_byte") is not None)

    def phase(self, name: str = TRAINING, done: int = 0, of: int = 0) -> None:
        """Set what the run is doing, and how much of it is done; other readings stand still while it does not train."""
        now = self._clock()
        if name != self._phase:
            self._phase_started = now
            self._phase_line = now + PHASE_LINE_AFTER
        self._phase, self._done, self._of = name, done, of
        if self._live is None and name != TRAINING and now >= self._phase_line:
            self._phase_line = now + PHASE_LINE_EVERY
            self._reporter.info(f"step {self._step}: {self.doing}")

    @property
    def doing(self) -> str:
        """The phase in words, such as "evaluating 3 of 40, ETA 0:12"."""
        if not self._of:
            return self._phase
        spent = self._clock() - self._phase_started
        eta = format_duration(spent * (self._of - self._done) / self._done) if self._done else "–"
        return f"{self._phase} {self._done} of {self._of}, ETA {eta}"

    def event(self, message: str) -> None:
        """Report an event as one line (above the panel on a terminal)."""
        self._reporter.info(message)

    def eta(self) -> float | None:
        """Seconds until the last step at the mean rate so far, once it is known."""
        if self._first is None or self._step <= self._first[0]:
            return None
        per_step = (self._clock() - self._first[1]) / (self._step - self._first[0])
        return max(self.total_steps - self._step, 0) * per_step

    def _print_lines(self, step: int, *, evaluated: bool) -> None:
        if evaluated:
            self._reporter.info("  ".join([f"step {step}", *self._evaluation()]))
        overdue = self._clock() - self._last_line_at >= LONGEST_SILENCE
        due = step % self._log_interval == 0 or step == self.total_steps or overdue
        if due and step != self._last_line and self._readings.loss is not None:
            self._last_line, self._last_line_at = step, self._clock()
            parts = [f"step {step}/{self.total_steps}", *self._training(), *self._speed(), *self._times()]
            self._reporter.info("  ".join(parts))

    def _training(self) -> list[str]:
        now = self._readings
        parts = [
            f"loss {_number(now.loss, '.4f')}",
            f"lr {_number(now.lr, '.3g')}",
            f"grad norm {_number(now.grad_norm, '.3g')}",
            f"skipped {now.skipped:.0f}",
        ]
        return parts if now.kept_share is None else [*parts, f"{now.kept_share:.0%} of the tokens kept"]

    def _evaluation(self) -> list[str]:
        now = self._readings
        scope = [] if now.eval_scope is None else [f"({now.eval_scope})"]
        return [
            f"held-out loss {_number(now.eval_loss, '.4f')}",
            " ".join([f"{_number(now.bits_per_byte, '.4f')} bits per byte", *scope]),
        ]

    def _speed(self) -> list[str]:
        now = self._readings
        rate = "–" if now.tokens_per_second is None else format_quantity(now.tokens_per_second, "")
        parts = [f"{rate} tok/s"]
        if now.utilisation is not None:
            peak = "peak" if self._peak_flops is None else format_quantity(self._peak_flops / 1e9, "GFLOP/s")
            parts.append(f"{now.utilisation:.0%} of {peak}")
        return [*parts, f"data wait {_number(now.data_wait_ms, '.1f')} ms"]

    def _times(self) -> list[str]:
        eta = self.eta()
        remaining = "–" if eta is None else format_duration(eta)
        elapsed = f"elapsed {format_duration(self._clock() - self._started)}"
        return [elapsed, f"ETA {remaining}" if self._phase == TRAINING else self.doing]

    def panel(self) -> "RenderableType":
        """What stays in place on a terminal."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self._live.console.width if self._live is not None else 80
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_row(ProgressBar(total=max(self.total_steps, 1), completed=self._step))
        grid.add_row(Text("   ".join([f"{self._step / max(self.total_steps, 1):.0%}", *self._times()])))
        curve = sparkline(self._history.values, max(min(width - 40, 64), 8))
        grid.add_row(Text.assemble("   ".join(self._training()[:1]), "  ", (curve, "cyan")))
        grid.add_row(Text("   ".join(self._evaluation())))
        grid.add_row(Text("   ".join(self._speed())))
        grid.add_row(Text("   ".join(self._training()[1:])))
        title = Text(f"{self._title} · step {self._step:,} of {self.total_steps:,}")
        return Panel(grid, title=title, title_align="left", border_style="dim", width=min(width, 100))


_NAMES = tuple(field.name for field in fields(Readings))


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
