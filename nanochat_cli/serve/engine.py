"""The native engine behind the server: one thread that steps a `ContinuousBatch`, and tickets for the event loop.

Requests beyond the places of the batch wait in order, up to a bound; then RequestError 429 says when to come back. A
ticket is released when its answer ends or its client leaves: its rows leave the batch at the next step.
"""

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from nanochat_cli.data.fim import NAMES
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.errors import DataError, NanochatError
from nanochat_cli.inference.continuous_batch import ContinuousBatch, Row
from nanochat_cli.serve.errors import RequestError
from nanochat_cli.serve.metrics import Metrics

if TYPE_CHECKING:
    from fastapi import Request

    from nanochat_cli.inference.packed_model import PackedTransformer

RETRY_SECONDS = 1
"""What a client is told to wait when the queue is full."""
LOOK_EVERY = 0.5
"""Seconds after which a request that waits looks whether its client is still there."""

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Served:
    """What is served. name: as clients see it; template: of conversations, Jinja, None without one.

    spm: whether the model was trained to fill in with the suffix first; fim: whether it was trained to fill in at all.
    """

    name: str
    model: "PackedTransformer"
    tokenizer: Tokenizer
    template: str | None = None
    spm: bool = False
    fim: bool = True

    @property
    def context(self) -> int:
        return self.model.config.max_seq_len

    @property
    def fills_in(self) -> bool:
        """Whether the model was trained to fill in, and has the tokens to be asked."""
        return self.fim and all(name in self.tokenizer.special_tokens for name in NAMES)

    def decode(self, ids: Sequence[int]) -> str:
        """RequestError for an id that the vocabulary lacks."""
        self.require_known(ids)
        return self.tokenizer.decode(ids)

    def require_known(self, ids: Sequence[int]) -> None:
        if ids and max(ids) >= self.tokenizer.vocab_size:
            raise RequestError(400, f"token {max(ids)} is outside the vocabulary of {self.tokenizer.vocab_size}")


class Ticket:
    """The rows of one request. Times are perf_counter's; they are written by the thread of the engine."""

    def __init__(self, rows: Sequence[Row], release: Callable[["Ticket"], None]) -> None:
        self.rows, self._release = rows, release
        self.error: NanochatError | RuntimeError | None = None
        self.started: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()

    @property
    def done(self) -> bool:
        return self.error is not None or all(row.finish is not None for row in self.rows)

    def notify(self) -> None:
        """Wake the request; from any thread."""
        self._loop.call_soon_threadsafe(self._changed.set)

    def close(self) -> None:
        """Let rows that have not ended leave, and free the request's place in the queue. May be called again."""
        for row in self.rows:
            row.cancel()
        self._release(self)

    async def changes(self, seconds: float, request: "Request | None" = None) -> AsyncIterator[None]:
        """Yield after every change of a row, last when all have ended; at most for `seconds`, then they end there.

        request: ends when its client leaves. Raises RequestError if the engine fails.
        """
        deadline = time.monotonic() + seconds
        while True:
            done = self.done  # before the texts are looked at: what comes after it is seen the next time
            self._raise_error()
            yield
            if done:
                return
            try:
                async with asyncio.timeout(LOOK_EVERY):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            if time.monotonic() > deadline:
                for row in self.rows:
                    row.cancel("length")
            if request is not None and await request.is_disconnected():
                return

    def _raise_error(self) -> None:
        if isinstance(self.error, DataError):
            raise RequestError(500, str(self.error))
        if self.error is not None:
            raise RequestError(500, "the engine failed; it starts anew with the next request")


class NativeEngine:
    """Loads what `load` returns in its own thread, and computes there.

    slots: rows that are continued together; waiting: requests beyond as many.
    """

    def __init__(self, load: Callable[[], Served], slots: int, waiting: int) -> None:
        self.slots, self.waiting = slots, waiting
        self.metrics = Metrics()
        self.failure: NanochatError | None = None
        """Why there is no model."""
        self._load, self._stopped = load, False
        self._served: Served | None = None
        self._open = set[Ticket]()
        self.metrics.open.set_function(lambda: len(self._open))
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._tickets = dict[Row, Ticket]()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.on_stop: Callable[[], None] = lambda: None
        """Called in the thread of the engine when it has ended."""

    # -- for the event loop --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._tasks.put(None)
        self._thread.join()

    @property
    def ready(self) -> bool:
        return self._served is not None and not self._stopped

    @property
    def served(self) -> Served:
        """Raises RequestError 503 while it loads."""
        if self._served is None or not self.ready:
            raise RequestError(503, "the engine has stopped" if self._stopped else "the model is loading")
        return self._served

    def submit(self, rows: Sequence[Row]) -> Ticket:
        """Continue rows. Raises RequestError: 429 when as many requests wait as may, 400 for too long a prompt."""
        context = self.served.context
        for row in rows:
            if len(row.prompt) > context:
                raise RequestError(
                    400, f"the prompt has {len(row.prompt)} tokens and the model's context holds {context}", "prompt"
                )
        self._require_room()
        ticket = Ticket(rows, self._open.discard)
        self._open.add(ticket)
        self._tasks.put(lambda: self._admit(ticket))
        return ticket

    async def compute(self, work: Callable[[], _Result]) -> _Result:
        """Do something else with the model, between two steps. Raises RequestError 429 like `submit`."""
        self._require_room()
        found: Future[_Result] = Future()

        def do() -> None:
            try:
                found.set_result(work())
            except (NanochatError, RuntimeError, MemoryError) as error:
                found.set_exception(error)

        self._tasks.put(do)
        return await asyncio.wrap_future(found)

    def _require_room(self) -> None:
        if len(self._open) >= self.slots + self.waiting:
            self.metrics.rejected.inc()
            raise RequestError(
                429,
                f"{len(self._open)} requests are being answered or wait: try again later",
                Retry_After=str(RETRY_SECONDS),
            )

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._served = self._load()
            self._batch = self._empty_batch()
            while self._take_tasks():
                self._step()
        except NanochatError as error:
            self.failure = error
        finally:
            self._stopped = True
            self._fail(self._open.copy(), RuntimeError("the engine has stopped"))
            self.on_stop()

    def _empty_batch(self) -> ContinuousBatch:
        served = self.served
        tokenizer = served.tokenizer
        return ContinuousBatch(served.model, self.slots, eos_id=tokenizer.eos_id, never=tokenizer.never_sampled)

    def _take_tasks(self) -> bool:
        """Do what was asked, waiting for it when no row is left; False at the end."""
        while True:
            try:
                task = self._tasks.get(block=not self._tickets)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()

    def _admit(self, ticket: Ticket) -> None:
        for row in ticket.rows:
            self._batch.submit(row)
            self._tickets[row] = ticket

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            drawn = self._batch.step()
        except (NanochatError, RuntimeError, MemoryError) as error:
            self._fail(set(self._tickets.values()), error if isinstance(error, NanochatError) else RuntimeError())
            self._batch = self._empty_batch()
            return
        now = time.perf_counter()
        self.metrics.step(self._batch.running, now - began, [row for row in drawn if len(row.tokens) == 1], len(drawn))
        changed = {self._tickets[row] for row in drawn}
        for row in [row for row in self._tickets if row.finish is not None]:
            changed.add(self._tickets.pop(row))
        for ticket in changed:
            ticket.started = began if ticket.started is None else ticket.started
            ticket.first = now if ticket.first is None else ticket.first
            ticket.last = now
            ticket.notify()

    def _fail(self, tickets: set[Ticket], error: NanochatError | RuntimeError) -> None:
        for ticket in tickets:
            ticket.error = error
            ticket.notify()
        self._tickets.clear()
