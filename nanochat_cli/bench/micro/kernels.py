"""Packed ternary products against `F.linear` in one process: time, bytes per second, and the memory roof above them.

Every contender has so many copies of its weights that they exceed the last-level cache, and all take turns. Ours
includes quantising its activations. Timing calls and measuring the memory roof is left to the device (`kernels_cpu`,
`kernels_cuda`), the picture to `roofline`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Result, summarise
from nanochat_kernels import Granularity, PackedTernary, packed_linear, ternarize_packed

Call = Callable[[], Tensor]
MIN_COPIES = 2
ROUNDS = 7
QUICK_ROUNDS = 5


@dataclass(frozen=True)
class Product:
    """M tokens times a [rows, columns] matrix."""

    rows: int
    columns: int
    tokens: int
    granularity: Granularity = "row"

    def __str__(self) -> str:
        kind = "GEMV" if self.tokens == 1 else "GEMM"
        scale = "" if self.granularity == "row" else f", scale {self.granularity}"
        return f"{kind} {self.rows}×{self.columns}, M {self.tokens}{scale}"

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.columns * self.tokens


FULL = [
    Product(rows, columns, tokens)
    for tokens in (1, 16, 512)
    for rows, columns in ((768, 768), (2048, 768), (4096, 4096), (11008, 4096))
] + [Product(4096, 4096, 1, 128)]
QUICK = [Product(768, 768, 1), Product(4096, 4096, 1), Product(4096, 4096, 1, 128), Product(768, 768, 512)]


class Device(Protocol):
    """Where products are measured."""

    name: str
    torch_device: torch.device
    backend: str
    rotation_bytes: int
    """Smallest total size of the copies of one contender's weights."""
    activation_dtype: torch.dtype
    """Of the activations for our kernel."""
    memory_roof: str
    """Name of the roof's measurement."""

    def prepare(self, calls: Sequence[Call]) -> Callable[[], float]:
        """Warm up, and return a function that runs all calls once and returns the seconds per call."""
        ...

    def bytes_per_second(self) -> float:
        """One measurement of the memory roof."""
        ...

    def peak(self) -> tuple[str, float]:
        """The measured rate of a matmul, for comparison: its name and operations per second."""
        ...


@dataclass(frozen=True)
class Point:
    """One product on the roofline. bytes: packed weights, scales, activations and results, each once."""

    product: Product
    seconds: float
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.product.operations / self.bytes

    @property
    def rate(self) -> float:
        """Operations per second."""
        return self.product.operations / self.seconds


@dataclass
class KernelMeasurements:
    """The outcome of one run of the benchmark."""

    device: str
    memory_roof: str
    roof: float
    """Bytes per second, median of all measurements."""
    peak_name: str
    peak: float
    results: list[Result] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    rows: list[tuple[object, ...]] = field(default_factory=list)


COLUMNS = ("product", "ours, µs", "× bf16", "× fp32", "weights, GB/s", "% of roof", "Gop/s")


def measure(
    products: Sequence[Product], device: Device, reporter: Reporter, rounds: int = ROUNDS
) -> KernelMeasurements:
    """Time every product, ours and both peers in turn, with one measurement of the memory roof per round."""
    peak_name, peak = device.peak()
    measurements = KernelMeasurements(device.name, device.memory_roof, 0.0, peak_name, peak)
    roofs: list[float] = []
    with reporter.progress("timing products", len(products) * rounds, "rounds") as progress:
        for product in products:
            _measure_product(product, device, rounds, roofs, measurements, progress.advance)
    measurements.roof = sorted(roofs)[len(roofs) // 2]
    measurements.results.append(summarise(device.name, device.memory_roof, "B/s", roofs))
    measurements.results.append(Result(device.name, peak_name, peak, "op/s"))
    return measurements


def _measure_product(
    product: Product,
    device: Device,
    rounds: int,
    roofs: list[float],
    measurements: KernelMeasurements,
    advance: Callable[[], None],
) -> None:
    weights = packed_copies(product, device)
    contenders = {
        "ours": device.prepare(_our_calls(product, weights, device)),
        "bf16": device.prepare(_linear_calls(product, device, torch.bfloat16)),
        "fp32": device.prepare(_linear_calls(product, device, torch.float32)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    shares: list[float] = []
    for _ in range(rounds):
        for name, run in contenders.items():
            seconds[name].append(run())
        roofs.append(device.bytes_per_second())
        shares.append(weights[0].bytes / seconds["ours"][-1] / roofs[-1])
        advance()
    case = f"{product}, {device.name}"
    results = [
        summarise(
            case, "time", "s", seconds["ours"], peer=f"F.linear {peer}", peer_runs=seconds[peer], smaller_is_better=True
        )
        for peer in ("bf16", "fp32")
    ]
    results += [summarise(f"{case}: F.linear {peer}", "time", "s", seconds[peer]) for peer in ("bf16", "fp32")]
    results.append(summarise(case, f"packed bytes per second, share of {device.memory_roof}", "share", shares))
    measurements.results += results
    ours, share = results[0].value, results[-1].value
    moved = weights[0].bytes + product.tokens * (product.columns * device.activation_dtype.itemsize + product.rows * 4)
    measurements.points.append(Point(product, ours, moved))
    rates = weights[0].bytes / ours / 1e9, 100 * share, product.operations / ours / 1e9
    measurements.rows.append((str(product), ours * 1e6, results[0].ratio, results[1].ratio, *rates))


def packed_copies(product: Product, device: Device) -> list[PackedTernary]:
    """Copies of one packed matrix, at least rotation_bytes in all."""
    latent = _random((product.rows, product.columns), product.rows, device)
    first = ternarize_packed(latent, product.granularity)
    copies = [first]
    while len(copies) < MIN_COPIES or len(copies) * first.bytes < device.rotation_bytes:
        copies.append(PackedTernary(first.packed.clone(), first.scales.clone(), first.columns))
    return copies


def _our_calls(product: Product, weights: Sequence[PackedTernary], device: Device) -> list[Call]:
    x = _activations(product, device, device.activation_dtype)
    return [lambda weight=weight: packed_linear(x, weight, x.dtype, backend=device.backend) for weight in weights]


def _linear_calls(product: Product, device: Device, dtype: torch.dtype) -> list[Call]:
    x = _activations(product, device, dtype)
    first = _random((product.rows, product.columns), product.columns, device).to(dtype)
    n_bytes = first.numel() * first.element_size()
    copies = max(MIN_COPIES, -(-device.rotation_bytes // n_bytes))
    weights = [first, *(first.clone() for _ in range(copies - 1))]
    return [lambda weight=weight: F.linear(x, weight) for weight in weights]


def _activations(product: Product, device: Device, dtype: torch.dtype) -> Tensor:
    return _random((product.tokens, product.columns), product.tokens, device).to(dtype)


def _random(shape: tuple[int, int], seed: int, device: Device) -> Tensor:
    generator = torch.Generator(device.torch_device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device.torch_device)
