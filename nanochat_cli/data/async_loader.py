"""The asynchronous loader: processes read ahead; batches have the order and the values of a single reader.

Batch `index` is a pure function of the source, so neither the number of workers nor their speed matters. Results
are in shared memory; only indices and tracebacks are sent. Knows processes; knows nothing of what a batch is made
of, nor of torch.

Workers are separate programs, not forks or spawned copies: they import neither torch nor the caller's main
module, and need no helper process that could outlive them.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import wait
from types import TracebackType
from typing import NamedTuple, Self

from numpy.typing import NDArray

from nanochat_cli.data.batches import Batch
from nanochat_cli.data.loader_sources import SourceSpec
from nanochat_cli.data.loader_worker import map_slots, slot_bytes
from nanochat_cli.errors import DataError

START = "import sys; from nanochat_cli.data.loader_worker import main; main(int(sys.argv[1]), int(sys.argv[2]))"
# There are many workers, so each has one thread.
SINGLE_THREADED = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
ENDS_WITHIN = 5.0


class _Task(NamedTuple):
    """aim: counts the loader's jumps to another index; results of tasks from before the last jump are dropped."""

    batch: int
    slot: int
    aim: int


class _Worker:
    """A process, the connection to it, and the tasks it was sent and has not finished, in order."""

    def __init__(self, spec: bytes, memory_fd: int) -> None:
        self.connection, theirs = Pipe()
        self.tasks: deque[_Task] = deque()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno()), str(memory_fd)],
                pass_fds=(theirs.fileno(), memory_fd),
                env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # a terminal sends Ctrl-C to the group of the parent
            )
        try:
            self.connection.send_bytes(spec)
        except BrokenPipeError as error:
            raise self.died() from error

    def died(self) -> DataError:
        """An error that says how the process ended."""
        try:
            code = self.process.wait(ENDS_WITHIN)
        except subprocess.TimeoutExpired:
            code = 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return DataError(
            f"a loader process (pid {self.process.pid}) {how}, perhaps for lack of memory: lower loader.workers or "
            "loader.prefetch, or set loader.enabled=false; the run continues from its last checkpoint"
        )

    def end(self) -> None:
        self.connection.close()
        self.process.kill()  # it owns nothing that needs cleaning up
        self.process.wait()


class AsyncLoader:
    """Batches of `spec`, read ahead by `workers` processes; at most `prefetch` are ready or in progress.

    Processes start with the first request. Consecutive indices are fast; the last batch may be requested again, and any
    other index makes the workers restart there. `close` ends the processes, and so does any error; a later request
    starts them again.
    """

    def __init__(self, spec: SourceSpec, workers: int, prefetch: int) -> None:
        self.spec = spec
        self.n_workers = min(workers, prefetch)  # more would have nothing to do
        self.prefetch = prefetch
        self._workers: list[_Worker] = []
        self._slots: NDArray | None = None
        self._reset(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close()

    def batch(self, index: int) -> Batch:
        """Batch `index`: (inputs, targets), int64 [batch_size, seq_len], which the caller owns.

        Waits until it is ready. Raises DataError, with the worker's traceback, if reading it failed, and if a worker
        died, however it died.
        """
        if not self._workers:
            self._start(index)
        try:
            if index not in (self._current, self._next):
                self._aim_at(index)
            if index == self._next:
                self._advance()
            slot = self._ready[index]
        except BaseException:
            self.close()
            raise
        assert self._slots is not None
        inputs, targets = self._slots[slot].copy()
        return inputs, targets

    def is_ready(self, index: int) -> bool:
        """Whether `batch(index)` would not wait."""
        if self._workers:
            try:
                self._receive(timeout=0)
            except BaseException:
                self.close()
                raise
        return index in self._ready

    def close(self) -> None:
        """End the workers, and wait for it."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._slots = None
        self._reset(0)

    def _reset(self, index: int) -> None:
        self._aim = 0
        self._current: int | None = None
        self._next = index  # the batch that comes after the current one
        self._asked = index  # the first that no worker was sent
        self._ready: dict[int, int] = {}
        self._failed: dict[int, str] = {}
        self._free = list(range(self.prefetch + 1))  # one more: the current one stays until the next is requested

    def _start(self, index: int) -> None:
        self._reset(index)
        slots = self.prefetch + 1
        spec = pickle.dumps((self.spec, slots))
        fd = _anonymous_memory(slots * slot_bytes(self.spec))
        try:
            for _ in range(self.n_workers):
                self._workers.append(_Worker(spec, fd))
        except BaseException:
            os.close(fd)
            self.close()
            raise
        self._slots = map_slots(fd, self.spec, slots)

    def _aim_at(self, index: int) -> None:
        """Forget what was read ahead; slots that are being filled become free when they are reported."""
        self._aim += 1
        self._free += self._ready.values()
        self._ready.clear()
        self._failed.clear()
        self._current, self._next, self._asked = None, index, index

    def _advance(self) -> None:
        """Make the next batch the current one, and free the slot of the one before."""
        if self._current is not None:
            self._free.append(self._ready.pop(self._current))
            self._current = None
        self._ask()
        while self._next not in self._ready:
            if self._next in self._failed:
                raise DataError(f"batch {self._next} could not be read:\n{self._failed[self._next]}")
            self._receive(timeout=None)
            self._ask()
        self._current = self._next
        self._next += 1
        self._receive(timeout=0)
        self._ask()

    def _ask(self) -> None:
        while self._free and self._asked < self._next + self.prefetch:
            worker = min(self._workers, key=lambda worker: len(worker.tasks))
            task = _Task(self._asked, self._free.pop(), self._aim)
            try:
                worker.connection.send((task.batch, task.slot))
            except (BrokenPipeError, ConnectionResetError):
                self._receive(timeout=0)  # it may have reported why
                raise worker.died() from None
            worker.tasks.append(task)
            self._asked += 1

    def _receive(self, timeout: float | None) -> None:
        """Collect the workers' reports. Raises DataError if one has died."""
        reporting = wait([worker.connection for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.connection in reporting]:
            try:
                index, failure = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                raise worker.died() from None
            if index is None:
                raise DataError(f"a loader process could not start:\n{failure}")
            task = worker.tasks.popleft()
            if task.aim != self._aim:
                self._free.append(task.slot)
            elif failure is None:
                self._ready[index] = task.slot
            else:
                self._free.append(task.slot)
                self._failed[index] = failure


def _anonymous_memory(size: int) -> int:
    """A file descriptor of memory that is freed with the last process that has it, however that ends."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("nanochat-loader")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
