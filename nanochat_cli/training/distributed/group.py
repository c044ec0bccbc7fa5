"""The processes that train together, and what they send each other: torch.distributed, NCCL on GPUs and gloo on CPUs.

Knows tensors, plain values and who is first; nothing of models. Rank 0 is the one that prepares, writes and prints.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] - documented as public
from torch.distributed.rendezvous import rendezvous

from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError, DataError, Interrupted
from nanochat_cli.training.devices import choose_device
from nanochat_cli.training.distributed.ranks import attempt, is_launched, rank, require_shareable, world_size

LONGEST_PAUSE = 0.1
"""Seconds between two looks for a value of another rank."""

_opened = count()
"""Groups of this process, which the launcher's store tells apart by their number."""


class Group:
    """This process's place among `size` ranks. store: None for a process that nobody launched, the only rank.

    All methods are called by all ranks in the same order. Raises DataError when another rank has ended.
    """

    def __init__(self, device: torch.device, store: Store | None = None, timeout: int = 0) -> None:
        self.device, self._store, self.timeout = device, store, timeout
        self.rank, self.size = (0, 1) if store is None else (rank(), world_size())
        self._exchanged = count()
        """Numbers of values, so that each has its own key."""
        self._read: list[str] = []

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place. Exact in any order where only one rank has a number that is not 0."""
        if self._store is not None:
            with self.contact():
                dist.all_reduce(tensor)
        return tensor

    def any(self, here: bool) -> bool:
        """Whether it is true on some rank."""
        return bool(self.add(torch.tensor(float(here), device=self.device)) > 0)

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
        """Send the r-th of flat parts to rank r; returns what each rank sent here, `sizes` elements."""
        if self._store is None:
            return parts
        received = parts[0].new_empty(sum(sizes))
        with self.contact():
            dist.all_to_all_single(received, torch.cat(list(parts)), [*sizes], [len(part) for part in parts])
        return received.split([*sizes])

    def transpose(self, tensor: Tensor) -> Tensor:
        """Send the r-th part of [ranks, …] to rank r; returns the parts that all ranks sent here, in their order."""
        received = torch.empty_like(tensor)
        with self.contact():
            dist.all_to_all_single(received, tensor)
        return received

    def gather(self, buffers: Sequence[Tensor]) -> None:
        """Fill the r-th buffer with that of rank r: an all-gather of unequal sizes."""
        if self._store is not None:
            with self.contact():
                for work in [dist.broadcast(buffer, source, async_op=True) for source, buffer in enumerate(buffers)]:
                    if work is not None:
                        work.wait()

    def send(self, tensor: Tensor, source: int) -> None:
        """Copy rank `source`'s tensor to all."""
        if self._store is not None:
            with self.contact():
                dist.broadcast(tensor, source)

    def share(self, value: Any = None) -> Any:
        """Rank 0's plain value, for which the others wait however long it takes."""
        if self._store is None:
            return value
        key = f"shared/{next(self._exchanged)}"
        if self.is_first:
            self._put(key, value)
            self._read.append(key)
        return self._taken(key)

    def collect(self, value: Any) -> list[Any]:
        """On rank 0 the plain value of each rank, for which it waits; nothing on the others."""
        if self._store is None:
            return [value]
        call = next(self._exchanged)
        if not self.is_first:
            self._put(f"collected/{call}/{self.rank}", value)
        self.any(False)  # all have come here; were one lost, the store would never tell
        if not self.is_first:
            return []
        keys = [f"collected/{call}/{rank}" for rank in range(1, self.size)]
        found = [value, *map(self._taken, keys)]
        with self.contact():
            for key in (*self._read, *keys):  # whoever has come here has read what was shared before
                self._store.delete_key(key)
        self._read.clear()
        return found

    def _put(self, key: str, value: Any) -> None:
        assert self._store is not None
        with self.contact():
            self._store.set(key, json.dumps(value))

    def _taken(self, key: str) -> Any:
        assert self._store is not None
        pause = 1e-3
        with self.contact():
            while not self._store.check([key]):
                time.sleep(pause)  # and not inside the store, where no signal arrives
                pause = min(2 * pause, LONGEST_PAUSE)
            return json.loads(self._store.get(key))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Within, an error of one rank ends all of them, which would wait for it. Raises DataError."""
        failure = None
        try:
            yield
        except DataError as error:
            failure = error
        message = self.share(next(filter(None, self.collect(failure and str(failure))), None))
        if message is not None:
            raise failure or DataError(message)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Rank 0 does it before the others do: it prepares what they then find."""
        if not self.is_first:
            self.share()
        yield
        if self.is_first:
            self.share()

    @contextmanager
    def contact(self) -> Iterator[None]:
        """Within, what a collective raises is that another rank has ended: DataError."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise DataError(
                f"another rank has ended, or was silent for distributed.timeout = {self.timeout} s; all end here, and "
                "the last checkpoint is intact: nanochat train --resume goes on from it"
            ) from error


@contextmanager
def open_group(config: Config) -> Iterator[Group]:
    """Join the ranks that the launcher started, or be the only one. Raises ConfigError for what they cannot share."""
    require_shareable(config, world_size())
    device, timeout = choose_device(config.train.device), config.distributed.timeout
    if not is_launched():
        yield Group(device)
        return
    if device.type == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ConfigError(f"this machine has {there} GPUs: start as many ranks on it, or set train.device = cpu")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    store = _join("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout))
    stopped = None
    try:
        yield Group(device, PrefixStore("values", store), timeout)
    except Interrupted as error:
        stopped = error
    dist.destroy_process_group()  # not after another error: the others may be gone
    if stopped is not None:
        raise stopped


def _join(backend: str, timeout: timedelta) -> Store:
    """Connect to the other ranks, and return the launcher's store. Raises DataError."""
    try:
        whole, *_ = next(iter(rendezvous("env://", timeout=timeout)))
        store = PrefixStore(f"nanochat/attempt-{attempt()}/group-{next(_opened)}", whole)
        tensors = PrefixStore("tensors", store)
        dist.init_process_group(backend, store=tensors, rank=rank(), world_size=world_size(), timeout=timeout)
    except RuntimeError as error:
        raise DataError(f"rank {rank()} cannot reach the others: {error}") from error
    return store
