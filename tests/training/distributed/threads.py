"""Ranks as threads of this process, for tests of what they exchange. Counts what is sent."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from nanochat_cli.training.distributed.group import Group

T = TypeVar("T")


class Meeting:
    """What the ranks have put on the table; all are there before one reads."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.table: list[Any] = [None] * size

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.table[rank] = value
        self.barrier.wait()
        found = list(self.table)
        self.barrier.wait()
        return found


class Thread(Group):
    """One rank. The collectives are those of the definition: no library in between."""

    def __init__(self, rank: int, size: int, meeting: Meeting) -> None:
        super().__init__(torch.device("cpu"))
        self.rank, self.size, self.meeting = rank, size, meeting
        self.sent = 0
        """Bytes of weights, to each other rank."""

    def add(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self.meeting.swap(self.rank, tensor.clone())).sum(dim=0))

    def exchange(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
        received = [theirs[self.rank].clone() for theirs in self.meeting.swap(self.rank, parts)]
        assert [len(part) for part in received] == list(sizes)
        return received

    def gather(self, buffers: Sequence[Tensor]) -> None:
        self.sent += len(buffers[self.rank])
        whole = self.meeting.swap(self.rank, buffers)
        for rank, buffer in enumerate(buffers):
            buffer.copy_(whole[rank][rank])
        self.meeting.barrier.wait()

    def send(self, tensor: Tensor, source: int) -> None:
        tensor.copy_(self.meeting.swap(self.rank, tensor.clone())[source])

    def share(self, value: Any = None) -> Any:
        return self.collect(value)[0]

    def collect(self, value: Any) -> list[Any]:
        return self.meeting.swap(self.rank, value)


def on_ranks(size: int, work: Callable[[Group], T]) -> list[T]:
    """What each rank returns."""
    meeting = Meeting(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Thread(rank, size, meeting)), range(size)))
