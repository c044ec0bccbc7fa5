"""The view of a GRPO run: a panel that stays in place on a terminal, a line per round elsewhere.

Knows only the numbers that it is given, and a clock.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from nanochat_cli.report.live import LONGEST_SILENCE, start_live
from nanochat_cli.report.quantities import format_duration, format_quantity
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.text_plot import sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class RoundsView:
    """`with RoundsView(reporter, 5, title="run") as view: view.phase("rollouts", 3, 40)`; `clock` returns seconds."""

    def __init__(
        self,
        reporter: Reporter,
        rounds: int,
        *,
        title: str,
        languages: Sequence[str] = ("rust",),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._labels = {"no_panics": "no panics" if "rust" in languages else "no exits"}
        self._reporter, self._rounds, self._title, self._clock = reporter, rounds, title, clock
        self._round = 0
        self._phase = ""
        self._done, self._of = 0, 1
        self._metrics: dict[str, float] = {}
        self._rewards: list[float] = []
        self._started = self._phase_started = self._last_line = clock()
        self._live: Live | None = None

    def __enter__(self) -> "RoundsView":
        self._live = start_live(self._reporter, self._panel)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str, done: int, of: int) -> None:
        """Show what the run is doing: `done` of `of` problems or updates."""
        now = self._clock()
        if name != self._phase:
            self._phase_started = now
        self._phase, self._done, self._of = name, done, of
        if self._live is None and now - self._last_line >= LONGEST_SILENCE:
            self._last_line = now
            self._reporter.info(self._where())

    def round(self, number: int, metrics: Mapping[str, float]) -> None:
        """Show a finished round; metrics by the names of the log."""
        self._round, self._metrics = number, dict(metrics)
        self._rewards = [*self._rewards, metrics["reward/total"]]
        self._last_line = self._clock()
        if self._live is None:
            parts = [*self._scores(), *self._terms(), *self._state(), f"elapsed {self._elapsed()}"]
            self._reporter.info("  ".join([f"round {number}/{self._rounds}", *parts]))

    def _where(self) -> str:
        spent = self._clock() - self._phase_started
        eta = format_duration(spent * (self._of - self._done) / self._done) if self._done else "–"
        return f"{self._phase}: {self._done} of {self._of}, ETA {eta}"

    def _scores(self) -> list[str]:
        shown = {"reward": "reward/total", "passed": "rollouts/pass_rate", "compiled": "rollouts/compile_rate"}
        return [f"{label} {self._metrics[name]:.3f}" for label, name in shown.items() if name in self._metrics]

    def _terms(self) -> list[str]:
        """Terms of the reward, named for the language, without those that are 0 for every answer."""
        terms = {name.removeprefix("reward/"): value for name, value in self._metrics.items() if "reward/" in name}
        return [
            f"{self._labels.get(name, name)} {value:.2f}" for name, value in terms.items() if name != "total" and value
        ]

    def _state(self) -> list[str]:
        parts = []
        if "library/size" in self._metrics:
            parts.append(f"library {self._metrics['library/size']:.0f}")
        if "policy/updates" in self._metrics:
            parts.append(f"updates {self._metrics['policy/updates']:.0f}")
        if "throughput/tokens_per_second" in self._metrics:
            parts.append(f"{format_quantity(self._metrics['throughput/tokens_per_second'], '')} tok/s")
        return parts

    def _elapsed(self) -> str:
        return format_duration(self._clock() - self._started)

    def _panel(self) -> "RenderableType":
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = min(self._live.console.width if self._live is not None else 80, 100)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(ratio=1)
        grid.add_row(ProgressBar(total=max(self._of, 1), completed=self._done))
        grid.add_row(Text(f"{self._where()}   elapsed {self._elapsed()}"))
        if self._metrics:
            curve = sparkline(self._rewards, max(min(width - 48, 48), 8))
            grid.add_row(Text.assemble("   ".join(self._scores()), "  ", (curve, "cyan")))
            grid.add_row(Text("   ".join(self._terms())))
            grid.add_row(Text("   ".join(self._state())))
        title = Text(f"{self._title} · round {self._round} of {self._rounds}")
        return Panel(grid, title=title, title_align="left", border_style="dim", width=width)
