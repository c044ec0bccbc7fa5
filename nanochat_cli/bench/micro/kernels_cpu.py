"""The CPU as a device for `kernels`: wall time of calls on cold weights, and the rate of a plain read of memory."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nanochat_cli.bench.micro.kernels import Call
from nanochat_cli.errors import ConfigError
from nanochat_cli.report.environment import cpu_model
from nanochat_kernels.backends import Unsupported
from nanochat_kernels.cpu.native import library

CACHES = 4
"""The rotating weights take this many times the last-level cache."""
MIN_ROTATION_BYTES = 100_000_000
READ_BYTES = 256 * 2**20
SECONDS_PER_PASS = 0.25
"""A pass over a contender's copies ends early after this time: slow products need no more calls."""
PEAK_SIZE = 2048


class CPU:
    """Runs calls one after the other, each on the next copy of its weights. ConfigError without compiled kernels."""

    backend = "cpu"
    activation_dtype = torch.float32
    memory_roof = "read rate of memory"

    def __init__(self) -> None:
        try:
            self._library = library()
        except Unsupported as reason:
            raise ConfigError(f"the CPU kernels cannot be measured here: {reason}") from reason
        self.torch_device = torch.device("cpu")
        count = torch.get_num_threads()
        self.name = f"{cpu_model()}, {count} thread{'s' * (count > 1)}"
        self.rotation_bytes = max(MIN_ROTATION_BYTES, CACHES * last_level_cache_bytes())
        self._buffer = torch.ones(READ_BYTES, dtype=torch.uint8)

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        for call in calls[:2]:
            call()
        position = 0

        def run() -> float:
            nonlocal position
            started = time.perf_counter()
            n = 0
            while n < len(calls):
                calls[(position + n) % len(calls)]()
                n += 1
                if time.perf_counter() - started > SECONDS_PER_PASS:
                    break
            elapsed = time.perf_counter() - started
            position += n  # the next pass continues from here, so that the copies stay cold
            return elapsed / n

        return run

    def bytes_per_second(self) -> float:
        started = time.perf_counter()
        self._library.nk_read_sum(self._buffer.data_ptr(), READ_BYTES)
        return READ_BYTES / (time.perf_counter() - started)

    def peak(self) -> tuple[str, float]:
        left, right = torch.ones(PEAK_SIZE, PEAK_SIZE), torch.ones(PEAK_SIZE, PEAK_SIZE)
        rates = []
        for _ in range(5):
            started = time.perf_counter()
            torch.mm(left, right)
            rates.append(2 * PEAK_SIZE**3 / (time.perf_counter() - started))
        return f"torch.mm fp32 {PEAK_SIZE}³", statistics.median(rates)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute on `count` threads, in torch and in the compiled kernels; None: as many as torch chose."""
    before = torch.get_num_threads()
    try:
        _set_threads(count or before)
        yield
    finally:
        _set_threads(before)


def last_level_cache_bytes() -> int:
    """The first core's last-level cache according to Linux; 32 MiB where it does not say."""
    sizes = [_cache_bytes(path) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 * 2**20)


def _cache_bytes(path: Path) -> int:
    text = path.read_text(encoding="ascii").strip()
    return int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1], 1)


def _set_threads(count: int) -> None:
    torch.set_num_threads(count)
    try:
        library().nk_set_threads(count)
    except Unsupported:
        return  # callers that need the compiled kernels check for them
