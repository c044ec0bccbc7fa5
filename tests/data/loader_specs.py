"""Sources for tests of the loader, and a program that reads one, which tests can kill."""

import os
import signal
from dataclasses import dataclass

import numpy as np

from nanochat_cli.data.async_loader import AsyncLoader
from nanochat_cli.data.batches import Batch


@dataclass(frozen=True)
class Counting:
    """Every token of batch i is i; batch `fails_at` raises, batch `dies_at` kills the process that reads it."""

    batch_size: int = 2
    seq_len: int = 4
    fails_at: int = -1
    dies_at: int = -1
    opens: bool = True

    def open(self) -> "Counting":
        if not self.opens:
            raise RuntimeError("this source does not open")
        return self

    def batch(self, index: int) -> Batch:
        if index == self.fails_at:
            raise ValueError(f"batch {index} is bad")
        if index == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        inputs = np.full((self.batch_size, self.seq_len), index, dtype=np.int64)
        return inputs, inputs + 1


def read_without_end() -> None:
    """Run as a separate program: prints the workers' process ids once they have answered."""
    with AsyncLoader(Counting(), workers=2, prefetch=4) as loader:
        loader.batch(0)
        loader.batch(1)
        print(*(worker.process.pid for worker in loader._workers), flush=True)
        index = 2
        while True:
            loader.batch(index)
            index += 1
