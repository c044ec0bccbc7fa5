"""The output of a command: one protocol, three voices (Rich on a terminal, plain lines, quiet).

The product of a command (`write`, `table`) goes to standard output; its messages (`info`, `warn`,
`progress`) to standard error, so that output can be piped. `result` collects what `--json` writes. Rich
is imported only on a terminal. The live view of training is `report.live`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Protocol

from nanochat_cli.atomic_write import write_atomically
from nanochat_cli.errors import DataError
from nanochat_cli.report.quantities import format_duration, format_quantity

FIRST_LINE_AFTER = 2.0
"""Seconds before plain progress prints its first line: shorter waits need none."""
LINE_EVERY = 10.0
"""Seconds between two plain progress lines."""


class Progress(Protocol):
    """A running count, in the unit given to `Reporter.progress`."""

    def advance(self, n: float = 1) -> None: ...


class Reporter(Protocol):
    """All output of the library, which never prints by itself."""

    results: dict[str, object]

    def info(self, message: str) -> None:
        """One line about what is happening."""
        ...

    def warn(self, message: str) -> None:
        """One line that a person should see; shown even when quiet."""
        ...

    def write(self, text: str) -> None:
        """The product itself, verbatim and flushed, such as generated text."""
        ...

    def end_line(self) -> None:
        """End the line that `write` has begun, if there is one."""
        ...

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table; numbers are aligned right."""
        ...

    def progress(
        self, description: str, total: float | None = None, unit: str = ""
    ) -> AbstractContextManager[Progress]:
        """Progress with a rate and, when `total` is known, an ETA. Unit "B" is bytes."""
        ...

    def result(self, values: Mapping[str, object]) -> None:
        """Add to what `--json` writes; later keys win."""
        ...


class _Voice:
    """Shared by the three reporters."""

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        self.results: dict[str, object] = {}
        self._mid_line = False
        self._out = out if out is not None else sys.stdout
        self._err = err if err is not None else sys.stderr

    def warn(self, message: str) -> None:
        print(f"warning: {message}", file=self._err, flush=True)

    def write(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
            self._mid_line = not text.endswith("\n") if text else self._mid_line
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            raise
        except OSError as error:
            raise DataError(f"standard output cannot be written: {error.strerror}; free space") from error

    def end_line(self) -> None:
        if self._mid_line:
            self.write("\n")

    def result(self, values: Mapping[str, object]) -> None:
        self.results.update(values)


class _SilentProgress:
    def advance(self, n: float = 1) -> None:
        pass


class QuietReporter(_Voice):
    """Only warnings and the product."""

    def info(self, message: str) -> None:
        pass

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        pass

    @contextmanager
    def progress(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
        yield _SilentProgress()


class SilentReporter(QuietReporter):
    """Nothing: of several processes that do the same, another one speaks."""

    def warn(self, message: str) -> None:
        pass

    def write(self, text: str) -> None:
        pass


class _LineProgress:
    """Progress as occasional lines; `clock` returns seconds."""

    def __init__(
        self, description: str, total: float | None, unit: str, write: Callable[[str], None], clock: Callable[[], float]
    ) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._write, self._clock = write, clock
        self._start = clock()
        self._next_line = self._start + FIRST_LINE_AFTER
        self._done: float = 0

    def advance(self, n: float = 1) -> None:
        self._done += n
        now = self._clock()
        if now >= self._next_line:
            self._next_line = now + LINE_EVERY
            self._write(self._line(now - self._start))

    def finish(self) -> None:
        """Report the total, if it took long enough to be worth a line."""
        elapsed = self._clock() - self._start
        if elapsed >= FIRST_LINE_AFTER:
            self._write(
                f"{self._description}: {format_quantity(self._done, self._unit)} in {format_duration(elapsed)}"
                f" ({self._rate(elapsed)})"
            )

    def _line(self, elapsed: float) -> str:
        done = format_quantity(self._done, self._unit)
        if not self._total:
            return f"{self._description}: {done}, {self._rate(elapsed)}"
        share = self._done / self._total
        eta = format_duration(elapsed * (1 - share) / share) if self._done else "unknown"
        return f"{self._description}: {share:.0%} ({done}), {self._rate(elapsed)}, ETA {eta}"

    def _rate(self, elapsed: float) -> str:
        return f"{format_quantity(self._done / max(elapsed, 1e-9), self._unit)}/s"


class PlainReporter(_Voice):
    """Plain lines, for logs, pipes and files."""

    def __init__(
        self, out: IO[str] | None = None, err: IO[str] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__(out, err)
        self._clock = clock

    def info(self, message: str) -> None:
        print(message, file=self._err, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        right = _right_aligned(len(columns), rows)
        lines = [title, *("  ".join(_pad(row[i], widths[i], right[i]) for i in range(len(columns))) for row in cells)]
        self.write("\n".join(line.rstrip() for line in lines) + "\n")

    @contextmanager
    def progress(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
        progress = _LineProgress(description, total, unit, self.info, self._clock)
        yield progress
        progress.finish()


class RichReporter(_Voice):
    """Colour, tables and bars on a terminal. `console` is where a live view may draw."""

    def __init__(self, out: IO[str] | None = None, err: IO[str] | None = None) -> None:
        from rich.console import Console

        super().__init__(out, err)
        self.console = Console(file=self._err, highlight=False)
        self._product = Console(file=self._out, highlight=False)

    def info(self, message: str) -> None:
        self.console.print(message, markup=False)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}", style="yellow", markup=False)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column, right in zip(columns, _right_aligned(len(columns), rows), strict=True):
            table.add_column(Text(column), justify="right" if right else "left")
        for row in rows:
            table.add_row(*(Text(_cell(value)) for value in row))
        self._product.print(table)

    @contextmanager
    def progress(self, description: str, total: float | None = None, unit: str = "") -> Iterator[Progress]:
        from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        start = time.monotonic()
        with Bars(*columns, console=self.console) as bars:
            task = bars.add_task(description, total=total, rate="")
            done = 0.0

            def count(n: float) -> None:
                nonlocal done
                done += n
                per_second = done / max(time.monotonic() - start, 1e-9)
                bars.update(task, advance=n, rate=f"{format_quantity(per_second, unit)}/s")

            yield _BarProgress(count)


class _BarProgress:
    def __init__(self, count: Callable[[float], None]) -> None:
        self._count = count

    def advance(self, n: float = 1) -> None:
        self._count(n)


def open_reporter(*, quiet: bool = False) -> Reporter:
    """The fitting voice: quiet if asked, Rich if standard error is a terminal, else plain."""
    if quiet:
        return QuietReporter()
    return RichReporter() if sys.stderr.isatty() else PlainReporter()


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a command's results, as `--json` promises. Values that are not JSON become text.

    A prompt that is not UTF-8 has lone surrogates, which are written as JSON escapes.
    """
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str) + "\n"
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _cell(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _right_aligned(columns: int, rows: Sequence[Sequence[object]]) -> list[bool]:
    """Whether each column holds only numbers."""
    return [
        bool(rows) and all(value is None or isinstance(value, (int, float)) for value in (row[i] for row in rows))
        for i in range(columns)
    ]


def _pad(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)
