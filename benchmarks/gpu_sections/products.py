"""Packed products of the section `roofline`: a table of them against cuBLAS, and tiles of their kernels.

Products are timed as CUDA graphs over more weights than the cache holds (`nanochat_cli.bench.micro.kernels_cuda`),
against cuBLAS through F.linear and against a plain copy of memory. The sweep times the product alone, with every
configuration of a list, and compares each result with that of the committed configuration; it stops when its time is
used up and says how far it got. It only reports: people copy its findings into `triton_kernels/configurations.py`.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_cli.bench.micro.kernels import Device, Product, measure, packed_copies
from nanochat_cli.report.reporter import Reporter
from nanochat_cli.report.result_file import Claim, Result
from nanochat_kernels import quantize_activations
from nanochat_kernels.triton_kernels.configurations import (
    GemvConfiguration,
    MatmulConfiguration,
    SmallMatmulConfiguration,
)

TABLE = [
    *(Product(rows, columns, 1) for rows, columns in ((4096, 4096), (8192, 8192), (28672, 8192))),
    Product(8192, 8192, 1, 128),
    *(Product(size, size, tokens) for tokens in (16, 512) for size in (4096, 8192)),
]
QUICK = [Product(128, 256, 1)]
TARGETS: dict[Product, float] = {
    Product(8192, 8192, 1): 4.0,
    Product(4096, 4096, 1): 2.5,
    Product(8192, 8192, 16): 3.0,
    Product(8192, 8192, 512): 1.3,
}
"""Times faster than cuBLAS in bf16."""
BANDWIDTH_TARGET = Product(28672, 8192, 1), 0.6
"""Share of the measured copy rate."""
ROUNDS = 5
SWEPT = [
    Product(8192, 8192, 1),
    Product(8192, 8192, 1, 128),
    Product(4096, 4096, 1),
    Product(8192, 8192, 16),
    Product(8192, 8192, 512),
]


def measure_table(
    device: Device, reporter: Reporter, products: Sequence[Product] = TABLE, rounds: int = ROUNDS
) -> tuple[list[Result], list[Claim]]:
    """The products of TABLE, activation quantisation included, and a claim per target."""
    table = measure(products, device, reporter, rounds)
    ratios = dict(zip(products, table.rows, strict=True))
    claims = [
        _claim(
            f"gpu-{product.rows}x{product.columns}-m{product.tokens}", f"{product} against cuBLAS bf16", least, ratio
        )
        for product, least in TARGETS.items()
        if product in ratios and isinstance(ratio := ratios[product][2], float)
    ]
    product, least = BANDWIDTH_TARGET
    if product in ratios and isinstance(share := ratios[product][5], float):
        claims.append(_claim("gpu-bandwidth", f"{product}: share of the {table.memory_roof}", least, share / 100))
    return table.results, claims


def _claim(name: str, statement: str, least: float, measured: float) -> Claim:
    verdict = "supported" if measured >= least else "not supported"
    return Claim(name, statement, "issue 3", f"at least {least:g}", f"{measured:.3g}", verdict)


# --- the sweep --------------------------------------------------------------------------------------------------------

Configuration = GemvConfiguration | SmallMatmulConfiguration | MatmulConfiguration
Form = Callable[[Configuration | None], Sequence[Callable[[], Tensor]]]
"""The calls of a product over its rotating weights with a configuration; None: the committed one."""


@dataclass(frozen=True)
class Swept:
    """One configuration of one product."""

    configuration: str
    seconds: float


def sweep(device: Device, reporter: Reporter, seconds: float, products: Sequence[Product] = SWEPT) -> list[Result]:
    """Time configurations of each product's kernel, an equal part of `seconds` for each product."""
    results: list[Result] = []
    for product in products:
        form, configurations = _form(product, device), list(_configurations(product))
        tried = _sweep_one(form, configurations, device, reporter, str(product), seconds / len(products))
        committed, others = tried[0], sorted(tried[1:], key=lambda entry: entry.seconds)
        reporter.table(
            f"{product}: {len(others)} of {len(configurations)} configurations, fastest first",
            ("configuration", "µs", "× committed"),
            [(e.configuration, e.seconds * 1e6, committed.seconds / e.seconds) for e in [committed, *others[:5]]],
        )
        case = f"sweep, {product}, {device.name}, product alone"
        results.append(Result(case, committed.configuration, committed.seconds, "s"))
        results += [
            Result(case, e.configuration, e.seconds, "s", committed.configuration, committed.seconds / e.seconds)
            for e in others
        ]
    return results


def _sweep_one(
    form: Form, configurations: Sequence[Configuration], device: Device, reporter: Reporter, name: str, seconds: float
) -> list[Swept]:
    """The committed configuration, then as many others as time allows, without wrong or failing ones."""
    ends = time.monotonic() + seconds
    calls = form(None)
    expected = calls[0]()
    tried = [Swept("committed", _fastest(device.prepare(calls)))]
    with reporter.progress(f"sweeping {name}", len(configurations), "configurations") as progress:
        for configuration in configurations:
            if time.monotonic() > ends:
                break
            progress.advance()
            try:
                calls = form(configuration)
                actual = calls[0]()
                if not torch.allclose(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())):
                    reporter.warn(f"{name}: {configuration} computes a wrong result")
                    continue
                tried.append(Swept(str(configuration), _fastest(device.prepare(calls))))
            except Exception as error:  # noqa: BLE001 - too much shared memory, a compiler's refusal: not this one
                reporter.warn(f"{name}: {configuration}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return tried


def _fastest(run: Callable[[], float]) -> float:
    return min(run() for _ in range(3))


def _form(product: Product, device: Device) -> Form:
    from nanochat_kernels.triton_kernels.gemv import ternary_gemv
    from nanochat_kernels.triton_kernels.int8_matmul import int8_matmul
    from nanochat_kernels.triton_kernels.small_matmul import ternary_small_matmul
    from nanochat_kernels.triton_kernels.unpack import unpack

    weights = packed_copies(product, device)
    x = torch.randn(product.tokens, product.columns, device=device.torch_device)
    activations = quantize_activations(x, weights[0].group, backend=device.backend)
    if product.tokens > 64:
        unpacked = [
            unpack(weight) for weight in weights[: max(2, device.rotation_bytes // (product.rows * product.columns))]
        ]
        return lambda configuration: [
            lambda weight=weight, codes=codes: int8_matmul(
                activations.codes,
                codes,
                activations.scale,
                weight.scales,
                configuration=configuration,  # pyright: ignore[reportArgumentType] - of this product's kind
            )
            for weight, codes in zip(weights, unpacked, strict=False)
        ]
    kernel = ternary_gemv if product.tokens == 1 else ternary_small_matmul
    return lambda configuration: [
        lambda weight=weight: kernel(activations, weight, torch.float32, configuration)  # pyright: ignore[reportArgumentType] - of this product's kind
        for weight in weights
    ]


def _configurations(product: Product) -> Iterator[Configuration]:
    if product.tokens == 1:
        # First those without barriers in their loops (`triton_kernels.gemv` says why), the committed kind among them.
        for tile in (
            (1, 128, 1),
            (2, 128, 1),
            (4, 128, 1),
            (1, 256, 1),
            (8, 16, 1),
            (8, 64, 4),
            (16, 64, 4),
            (8, 32, 2),
        ):
            yield GemvConfiguration(*tile)
        for rows, words, warps in itertools.product((8, 4, 16, 2), (128, 256), (4, 2, 8)):
            yield GemvConfiguration(rows, words, warps)
    elif product.tokens <= 64:
        tokens = 1 << (product.tokens - 1).bit_length()
        shapes = itertools.product((64, 128, 32), (1, 2, 4), (4, 8), (4, 3), (2, 1))
        for outputs, splits, warps, stages, blocks in shapes:
            yield SmallMatmulConfiguration(outputs, tokens, blocks, splits, warps, stages)
    else:
        tiles = ((128, 256, 128), (128, 128, 128), (64, 256, 128), (128, 256, 64), (256, 128, 128), (64, 128, 128))
        for tile, warps, stages in itertools.product(tiles, (8, 4), (3, 4)):
            yield MatmulConfiguration(*tile, warps, stages)
