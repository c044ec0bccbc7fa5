"""The display of a running suite: a table that stays in place on a terminal, or plain lines elsewhere.

Knows the readings of runs and a clock. A Rich thread redraws the table twice a second from the latest readings.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from nanochat_cli.bench.matched.suite_runs import Reading
from nanochat_cli.report.live import start_live
from nanochat_cli.report.quantities import format_duration, format_quantity
from nanochat_cli.report.reporter import LINE_EVERY, Reporter

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

WAITING, RUNNING = "waiting", "running"
COLUMNS = "run", "state", "progress", "ETA", "loss", "bpb", "tok/s", "memory"


@dataclass
class Row:
    """One run. seconds: how long its process took or has been running; None before it starts."""

    name: str
    state: str = WAITING
    seconds: float | None = None
    reading: Reading = field(default_factory=Reading)
    first: tuple[int, float] | None = None
    """Step and seconds of the first reading; the time before it went into starting the process."""

    def eta(self) -> float | None:
        """Seconds to the last step at the mean rate so far, once that is known."""
        if self.state != RUNNING or self.seconds is None or not self.reading.total_steps:
            return None
        if self.first is None or self.reading.step <= self.first[0]:
            return None
        per_step = (self.seconds - self.first[1]) / (self.reading.step - self.first[0])
        return per_step * max(self.reading.total_steps - self.reading.step, 0)


class SuiteView:
    """`with SuiteView(reporter, names) as view: view.start(0); view.update(reading); view.finish("finished")`"""

    def __init__(
        self, reporter: Reporter, names: Sequence[str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.rows = [Row(name) for name in names]
        self._reporter, self._clock = reporter, clock
        self._current = 0
        self._started = self._last_line = clock()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._live = start_live(self._reporter, self._table)
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def known(self, number: int, state: str) -> None:
        """Mark a run that had already ended when the suite was resumed."""
        self.rows[number].state = state

    def start(self, number: int) -> None:
        self._current = number
        self._started = self._last_line = self._clock()
        row = self.rows[number]
        row.state, row.seconds = RUNNING, 0.0
        self._say(f"{self._place()}: starts")

    def update(self, reading: Reading) -> None:
        row, now = self.rows[self._current], self._clock()
        row.seconds, row.reading = now - self._started, reading
        if row.first is None and reading.step:
            row.first = reading.step, row.seconds
        if now - self._last_line >= LINE_EVERY:
            self._last_line = now
            self._say(f"{self._place()}: {', '.join(self._parts(row))}, suite ETA {_duration(self.eta())}")

    def finish(self, state: str, reason: str | None = None) -> None:
        row = self.rows[self._current]
        row.state, row.seconds = state, self._clock() - self._started
        parts = [f"{state} after {format_duration(row.seconds)}"] + ([reason] if reason else self._parts(row))
        self._reporter.info(f"{self._place()}: {', '.join(parts)}")

    def eta(self) -> float | None:
        """Seconds until the suite ends, from the mean time of the runs that have ended; None before the first has."""
        times = [row.seconds for row in self.rows if row.state not in (WAITING, RUNNING) and row.seconds is not None]
        if not times:
            return None
        mean, current = sum(times) / len(times), self.rows[self._current]
        waiting = sum(row.state == WAITING for row in self.rows)
        rest = current.eta() if current.state == RUNNING else 0.0
        return mean * waiting + (max(mean - (current.seconds or 0.0), 0.0) if rest is None else rest)

    def _say(self, line: str) -> None:
        if self._live is None:
            self._reporter.info(line)

    def _place(self) -> str:
        return f"[{self._current + 1}/{len(self.rows)}] {self.rows[self._current].name}"

    def _parts(self, row: Row) -> list[str]:
        _, _, progress, _, loss, bits, rate, memory = self._cells(row)
        named = [(progress, "step {}"), (loss, "loss {}"), (bits, "{} bits per byte"), (rate, "{} tok/s")]
        return [form.format(text) for text, form in [*named, (memory, "{}")] if text]

    def _cells(self, row: Row) -> list[str]:
        now = row.reading
        total = f"{now.step}/{now.total_steps}" if now.total_steps else str(now.step)
        return [
            row.name,
            row.state,
            total if now.step else "",
            _duration(row.eta()) if row.state == RUNNING else "",
            "" if now.loss is None else f"{now.loss:.3f}",
            "" if now.bits_per_byte is None else f"{now.bits_per_byte:.3f}",
            "" if now.tokens_per_second is None else format_quantity(now.tokens_per_second, ""),
            "" if now.memory is None else format_quantity(now.memory, "B"),
        ]

    def _table(self) -> "RenderableType":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        done = sum(row.state not in (WAITING, RUNNING) for row in self.rows)
        title = f"{done} of {len(self.rows)} runs done, ETA {_duration(self.eta())}"
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
        for row in self.rows:
            style = {WAITING: "dim", RUNNING: "bold"}.get(row.state)
            table.add_row(*(Text(cell) for cell in self._cells(row)), style=style)
        return table


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else format_duration(seconds)
