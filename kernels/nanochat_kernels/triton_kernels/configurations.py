"""Tile sizes, committed: per kernel, architecture and class of shapes. Nothing is tuned at import or at run time.

MEASURED, on an H100 alone (benchmarks/results/gpu/roofline.json, cases "sweep", against the tile before it):
    decode, 1 token, 4 rows of 128 words:             1.15 x (8192²), 1.11 x (4096²), 1.09 x (8192², groups of 128)
    16 tokens, 8192², 3 stages instead of 4:          1.13 x
    int8, 512 tokens, 8192², 128 x 128 with 4 warps:  1.28 x
    int8, 8192³, 128 x 256 with 8 warps:              1.25 PFLOP/s, 1.57 x cuBLAS in bf16; other tiles were not tried
REASONED: everything else, other shapes on an H100 included. It follows from figures of the machine code
(benchmarks/results/kernel_aot.json): instructions per weight, registers, spills, shared memory; and from how many
programs a shape gives to 108 (A100), 132 (H100, H200) or 148 (B200) multiprocessors. Where nothing speaks against it,
A100 and B200 take what is faster on an H100. benchmarks/gpu.py sweeps the tiles on a GPU.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TernarizeConfiguration:
    """rows x blocks: the tile, blocks being those of 128 inputs; a row has a warp of its own.

    For scales of groups and tensors, block: elements per iteration; partial: elements per partial sum.
    """

    rows: int = 4
    blocks: int = 4
    num_warps: int = 4
    block: int = 1024
    partial: int = 16384


@dataclass(frozen=True)
class UnpackConfiguration:
    """The tile in rows and blocks of 128 weights, of int8: 16 bytes per lane and store. Wider values: fewer blocks."""

    rows: int = 8
    blocks: int = 8
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

# Up to so many tokens use packed weights with dp4a, then with tensor cores that unpack on the way; more unpack first.
# The second is reasoned, and the first to check on a GPU: on 9.0 the packed kernel's 128 x 128 tile issues 392 cycles
# of instructions against 982 of tensor cores, so it may win with more tokens too, and save the pass that unpacks.
GEMV_TOKENS = 4
PACKED_TOKENS = 64

TERNARIZE = TernarizeConfiguration()
UNPACK = UnpackConfiguration()

# One warp and 128 words per row: four words (64 weights) per lane, read at once, and no barrier anywhere. Four rows, or
# two, share the activations if there are enough programs (4096 outputs by 4 are 7.75 for each of 132
# multiprocessors); more tokens leave registers for only one row.
GEMV_WORDS = 128
GEMV_ROWS = {1: 4, 2: 1, 4: 1}
GEMV_PROGRAMS = 6
# Rows shorter than 128 words: eight of them fill the warp, 16 words each; one, read at once, if outputs are few.
GEMV_SHORT_WORDS = 16

# By architecture: the first tile whose least number of rows and of outputs is reached, and of programs per
# multiprocessor. On 9.0 two programs of the middle tile share a multiprocessor, so that one computes while the other
# begins or ends: with 0.97 large tiles for each it is 1.13 x as fast as these; with 15.5 (8192³) there is only the
# large tile's time. The line between, at 4, is reasoned, and so is the least for the middle tile.
Tiles = dict[int, list[tuple[int, int, MatmulConfiguration]]]
INT8_MATMUL: Tiles = {
    80: [(1024, 0, MatmulConfiguration(128, 128, 64, 8, 4)), (0, 0, MatmulConfiguration(64, 128, 64, 4, 4))],
    90: [
        (1024, 4, MatmulConfiguration(128, 256, 128, 8, 3)),
        (128, 1, MatmulConfiguration(128, 128, 128, 4, 3)),
        (0, 0, MatmulConfiguration(64, 128, 128, 4, 4)),
    ],
    100: [(1024, 0, MatmulConfiguration(128, 256, 128, 8, 3)), (0, 0, MatmulConfiguration(64, 128, 128, 4, 4))],
}

# 128 x 256 spills on 9.0: the sum that is moved to float32 every 128 products takes a second set of registers.
FP8_MATMUL: Tiles = {
    **INT8_MATMUL,
    90: [(1024, 0, MatmulConfiguration(128, 128, 128, 8, 4)), (0, 0, MatmulConfiguration(64, 128, 128, 4, 4))],
}

# Two bytes per input: half as many fill the same shared memory.
FLOAT16_MATMUL: Tiles = {
    80: [(1024, 0, MatmulConfiguration(128, 128, 32, 8, 4)), (0, 0, MatmulConfiguration(64, 128, 32, 4, 4))],
    90: [(1024, 0, MatmulConfiguration(128, 256, 64, 8, 3)), (0, 0, MatmulConfiguration(64, 128, 64, 4, 4))],
    100: [(1024, 0, MatmulConfiguration(128, 256, 64, 8, 3)), (0, 0, MatmulConfiguration(64, 128, 64, 4, 4))],
}

# The gradient of a weight: few outputs, and as many inputs as there are tokens. Two programs fit a multiprocessor.
WEIGHT_GRADIENT = {
    80: MatmulConfiguration(128, 128, 64, 8, 4),
    90: MatmulConfiguration(128, 128, 128, 4, 3),
    100: MatmulConfiguration(128, 128, 128, 4, 3),
}


def architecture(capability: int) -> int:
    """The table's architecture for a compute capability: the newest that is not newer."""
    return max(known for known in ARCHITECTURES if known <= max(capability, ARCHITECTURES[0]))


def gemv_configuration(capability: int, tokens: int, outputs: int, columns: int) -> GemvConfiguration:
    """For one scale per row and for groups alike."""
    processors = MULTIPROCESSORS[architecture(capability)]
    words = columns // 16
    if words >= GEMV_WORDS:
        rows = GEMV_ROWS[min(known for known in GEMV_ROWS if known >= tokens)]
        while rows > 1 and outputs < GEMV_PROGRAMS * rows * processors:
            rows //= 2
        return GemvConfiguration(rows, GEMV_WORDS, 1)
    short = min(words, GEMV_SHORT_WORDS)
    rows = GEMV_WORDS // short
    if outputs >= 4 * rows * processors:
        return GemvConfiguration(rows, short, 1)
    return GemvConfiguration(1, _power_of_2_at_least(words), 1)


def small_matmul_configuration(
    capability: int, group: int, tokens: int, outputs: int, columns: int
) -> SmallMatmulConfiguration:
    if tokens > 64 and not group:  # with groups, whose sums are kept twice, this tile spills
        return SmallMatmulConfiguration(128, 128, 2, 1, 8, 3)
    # With groups of 64, eight tokens per tile spill a register on 9.0 and 10.0.
    tile = min(max(_power_of_2_at_least(tokens), 16 if group == 64 else 8), 64)
    programs = -(-outputs // 64)
    steps = columns // max(group, 128)
    splits = 1
    while programs * splits < 2 * MULTIPROCESSORS[architecture(capability)] and splits * 8 <= steps:
        splits *= 2
    blocks = 1 if 0 < group <= 128 else 2
    return SmallMatmulConfiguration(64, tile, blocks, splits, 4, 3)


def matmul_configuration(capability: int, dtype: torch.dtype, rows: int, outputs: int) -> MatmulConfiguration:
    """For operands of int8, float8_e4m3fn or float16."""
    tables = {torch.int8: INT8_MATMUL, torch.float8_e4m3fn: FP8_MATMUL, torch.float16: FLOAT16_MATMUL}
    processors = MULTIPROCESSORS[architecture(capability)]

    def fills(tile: MatmulConfiguration, programs: int) -> bool:
        return -(-rows // tile.block_m) * -(-outputs // tile.block_n) >= programs * processors

    table = tables[dtype][architecture(capability)]
    return next(tile for least, programs, tile in table if min(rows, outputs) >= least and fills(tile, programs))


def nvfp4_configuration(capability: int, columns: int) -> MatmulConfiguration:
    """Rows of bytes that are not aligned are read byte by byte, in more registers, which a smaller tile leaves."""
    if columns % 256:
        return MatmulConfiguration(128, 64, 128, 8, 3)
    return MatmulConfiguration(128, 128, 256 if capability < 120 else 128, 8, 3)


def quantize_warps(values: int) -> int:
    """Warps for a token of `values` inputs: 32 values per thread, at most 16 warps."""
    return min(max(values // 1024, 1), 16)


def _power_of_2_at_least(value: int) -> int:
    return 1 << (value - 1).bit_length()
