"""A GPU as a device for `kernels`: products in a CUDA graph over rotating weights, and the rate of a plain copy."""

import statistics
from collections.abc import Callable, Sequence

import torch

from nanochat_cli.bench.micro.kernels import Call

ROTATION_BYTES = 256 * 2**20
"""Larger than any cache (60 MB on an H200)."""
COPY_BYTES = 2**30
REPLAYS = 5
PEAK_SIZE = 8192


class CUDA:
    """Runs all calls of a contender as one graph, without launch costs and without the host in between."""

    backend = "triton"
    activation_dtype = torch.bfloat16
    memory_roof = "copy rate of memory"
    rotation_bytes = ROTATION_BYTES

    def __init__(self) -> None:
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.torch_device)
        self._source = torch.ones(COPY_BYTES // 2, dtype=torch.uint8, device=self.torch_device)
        self._target = torch.empty_like(self._source)

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Compile and warm up outside the graph. The kernels' results stay allocated while the graph lives."""
        side = torch.cuda.Stream(self.torch_device)
        side.wait_stream(torch.cuda.current_stream(self.torch_device))
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream(self.torch_device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize(self.torch_device)

        def run() -> float:
            return self._seconds(graph.replay, REPLAYS) / len(calls)

        return run

    def bytes_per_second(self) -> float:
        return 2 * self._source.numel() / self._seconds(lambda: self._target.copy_(self._source), REPLAYS)

    def peak(self) -> tuple[str, float]:
        shape = (PEAK_SIZE, PEAK_SIZE)
        left, right = (torch.randn(shape, device=self.torch_device, dtype=torch.bfloat16) for _ in range(2))
        torch.mm(left, right)
        rates = [2 * PEAK_SIZE**3 / self._seconds(lambda: torch.mm(left, right), 1) for _ in range(5)]
        return f"torch.mm bf16 {PEAK_SIZE}³", statistics.median(rates)

    def _seconds(self, function: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
