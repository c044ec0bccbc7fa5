"""Tile sizes, committed: per kernel, architecture and class of shapes. Nothing is tuned at import or at run time.

HOW THEY WERE CHOSEN: no GPU was available. The figures that chose them were read off the machine code
(benchmarks/results/kernel_aot.json): instructions per weight, registers, spills, shared memory; and how many programs a
shape gives to 108 (A100), 132 (H100, H200) or 148 (B200) multiprocessors. No time was measured. benchmarks/gpu_kernels.py
sweeps them on a GPU; its result replaces the entries below, and this paragraph.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TernarizeConfiguration:
    """block: elements per iteration of the scale kernel; partial: elements per partial sum of a whole tensor.

    rows x planes: the tile of the codes kernel, in rows and blocks of 128 inputs.
    """

    block: int = 2048
    partial: int = 16384
    rows: int = 32
    planes: int = 1
    num_warps: int = 4


@dataclass(frozen=True)
class UnpackConfiguration:
    """The tile, in rows and packed bytes (32 bytes hold 128 weights)."""

    rows: int = 16
    bytes: int = 128
    num_warps: int = 4


@dataclass(frozen=True)
class GemvConfiguration:
    """rows: outputs of a program; words: 32-bit words of 16 weights per row and iteration."""

    rows: int
    words: int
    num_warps: int


@dataclass(frozen=True)
class SmallMatmulConfiguration:
    """outputs x tokens: the tile; blocks: blocks of 128 inputs per product; splits: programs that share the inputs."""

    outputs: int
    tokens: int
    blocks: int
    splits: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MatmulConfiguration:
    """block_m x block_n x block_k: the tile; swizzle: row tiles that run next to each other in time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swizzle: int = 8


ARCHITECTURES = (80, 90, 100)
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}

TERNARIZE = TernarizeConfiguration()
UNPACK = UnpackConfiguration()

# By whether scales are per group, then by tokens.
GEMV: dict[bool, dict[int, GemvConfiguration]] = {
    False: {
        1: GemvConfiguration(8, 128, 4),
        2: GemvConfiguration(8, 128, 4),
        4: GemvConfiguration(4, 128, 4),
    },
    True: {
        1: GemvConfiguration(8, 128, 4),
        2: GemvConfiguration(8, 128, 4),
        4: GemvConfiguration(4, 128, 4),
    },
}

# By architecture; large tiles for M and N above the second number, the small tile otherwise.
MATMUL: dict[int, list[tuple[int, MatmulConfiguration]]] = {
    80: [(1024, MatmulConfiguration(128, 128, 64, 8, 4)), (0, MatmulConfiguration(64, 128, 64, 4, 4))],
    90: [(1024, MatmulConfiguration(128, 256, 128, 8, 3)), (0, MatmulConfiguration(64, 128, 128, 4, 4))],
    100: [(1024, MatmulConfiguration(128, 256, 128, 8, 3)), (0, MatmulConfiguration(64, 128, 128, 4, 4))],
}


def architecture(capability: int) -> int:
    """The table's architecture for a compute capability: the newest that is not newer."""
    return max(known for known in ARCHITECTURES if known <= max(capability, ARCHITECTURES[0]))


def gemv_configuration(capability: int, grouped: bool, tokens: int, outputs: int, columns: int) -> GemvConfiguration:
    table = GEMV[grouped]
    configuration = table[min(known for known in table if known >= tokens)]
    words = columns // 16
    rows = configuration.rows
    # Every multiprocessor wants several programs in flight: fewer outputs each where there are few.
    while rows > 1 and outputs // rows < 4 * MULTIPROCESSORS[architecture(capability)]:
        rows //= 2
    return GemvConfiguration(rows, min(configuration.words, _power_of_2_at_most(words)), configuration.num_warps)


def small_matmul_configuration(
    capability: int, group: int, tokens: int, outputs: int, columns: int
) -> SmallMatmulConfiguration:
    tile = min(max(_power_of_2_at_least(tokens), 8), 64)
    programs = -(-outputs // 64)
    steps = columns // max(group, 128)
    splits = 1
    while programs * splits < 2 * MULTIPROCESSORS[architecture(capability)] and splits * 8 <= steps:
        splits *= 2
    return SmallMatmulConfiguration(64, tile, 1 if 0 < group <= 128 else 2, splits, 4, 4)


def matmul_configuration(capability: int, dtype: torch.dtype, rows: int, outputs: int) -> MatmulConfiguration:
    for least, configuration in MATMUL[architecture(capability)]:
        if min(rows, outputs) >= least:
            break
    if dtype == torch.float16:  # two bytes an input: half of them fill the same shared memory
        return MatmulConfiguration(
            configuration.block_m,
            configuration.block_n,
            configuration.block_k // 2,
            configuration.num_warps,
            configuration.num_stages,
        )
    return configuration


def quantize_warps(values: int) -> int:
    """Warps for a token of `values` inputs: 32 values a thread, at most 16 warps."""
    return min(max(values // 1024, 1), 16)


def _power_of_2_at_most(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def _power_of_2_at_least(value: int) -> int:
    return 1 << (value - 1).bit_length()
