"""How the AVX2 vector product should walk through the weights: the form that is used, and what else was tried.

    python benchmarks/gemv_variants.py [--quick] [--rounds 9]

Row by row, or two and four rows side by side (which share the loads of the activations), with several distances of
software prefetch; on weights in memory, and on weights that stay in the cache. Alternating in one process; bytes of
packed weights per second, against a plain read of memory with all threads.
"""

import argparse
import ctypes
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from nanochat_cli.report.result_file import Result, result_place, summarise, write_results
from nanochat_kernels.cpu.build import FLAGS, LIBRARIES, SOURCE_FOLDER

ROWS = (1, 2, 4)
PREFETCH_BYTES = (0, 512, 2048, 8192)
SHAPES = {"memory": (4096, 4096, 40), "cache": (512, 2048, 1)}
READ_BYTES = 200_000_000

# ROWS rows side by side: each load of activations serves all of them, but there are as many streams of weights.
VARIANT = """
#include "avx2.c"
#include <omp.h>

INLINE void block_of_rows(const uint8_t *packed, size_t k, const int8_t *codes, int32_t *out) {
    const __m256i ones = _mm256_set1_epi16(1);
    const size_t planes = k / PLANE, stride = k / 4;
    __m256i wide[ROWS];
    for (int r = 0; r < ROWS; r++) wide[r] = _mm256_setzero_si256();
    for (size_t start = 0; start < planes; start += K_BLOCK) {
        const size_t end = start + K_BLOCK < planes ? start + K_BLOCK : planes;
        __m256i narrow[ROWS];
        for (int r = 0; r < ROWS; r++) narrow[r] = _mm256_setzero_si256();
        for (size_t b = start; b < end; b++)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                const uint8_t *p = packed + (size_t)r * stride + b * PLANE_BYTES;
                if (PREFETCH_BYTES) _mm_prefetch((const char *)(p + PREFETCH_BYTES), _MM_HINT_T0);
                narrow[r] = _mm256_add_epi16(narrow[r], multiply_block(unpack_block(p), codes + b * PLANE));
            }
        for (int r = 0; r < ROWS; r++) wide[r] = _mm256_add_epi32(wide[r], _mm256_madd_epi16(narrow[r], ones));
    }
    for (int r = 0; r < ROWS; r++) out[r] = sum_i32(wide[r]);
}

AVX2 void gemv_variant(const uint8_t *packed, size_t n, size_t k, const int8_t *codes, int32_t *out) {
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; i += ROWS) block_of_rows(packed + i * (k / 4), k, codes, out + i);
}
"""


QUICK = {"rounds": 1}


def build(folder: Path, rows: int, prefetch: int) -> ctypes.CDLL:
    """The kernel with `rows` side by side; everything else comes from the shipped sources."""
    (folder / "variant.c").write_text(VARIANT)
    library = folder / f"rows{rows}-prefetch{prefetch}.so"
    defines = (f"-DROWS={rows}", f"-DPREFETCH_BYTES={prefetch}", f"-I{SOURCE_FOLDER}")
    sources = [
        str(folder / "variant.c"),
        *(str(SOURCE_FOLDER / name) for name in ("portable.c", "avx512.c", "operations.c")),
    ]
    subprocess.run(["cc", *FLAGS, *defines, *sources, "-o", str(library), *LIBRARIES], check=True)
    loaded = ctypes.CDLL(str(library))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    loaded.gemv_variant.argtypes = [pointer, size, size, pointer, pointer]
    loaded.nk_read_sum.argtypes = [pointer, size]
    return loaded


def bandwidth(library: ctypes.CDLL, weights: list[torch.Tensor], columns: int) -> float:
    """Bytes of weights per second of one pass over all copies."""
    rows = len(weights[0])
    codes, out = torch.ones(columns, dtype=torch.int8), torch.empty(rows, dtype=torch.int32)
    started = time.perf_counter()
    for weight in weights:
        library.gemv_variant(weight.data_ptr(), rows, columns, codes.data_ptr(), out.data_ptr())
    return len(weights) * weights[0].numel() / (time.perf_counter() - started)


def read_bandwidth(library: ctypes.CDLL, memory: torch.Tensor) -> float:
    started = time.perf_counter()
    library.nk_read_sum(memory.data_ptr(), READ_BYTES)
    return READ_BYTES / (time.perf_counter() - started)


def measure(rounds: int) -> list[Result]:
    memory = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        variants = {(rows, ahead): build(Path(folder), rows, ahead) for rows in ROWS for ahead in PREFETCH_BYTES}
        any_variant = next(iter(variants.values()))
        for where, (rows, columns, copies) in SHAPES.items():
            weights = [torch.full((rows, columns // 4), 0b01100100, dtype=torch.uint8) for _ in range(copies)]
            runs: dict[tuple[int, int], list[float]] = {variant: [] for variant in variants}
            reads = []
            repeated = weights * (1 if copies > 1 else 100)
            for turn in range(rounds + 1):
                read = read_bandwidth(any_variant, memory)
                rates = {variant: bandwidth(library, repeated, columns) for variant, library in variants.items()}
                if turn:  # the first warms up
                    reads.append(read)
                    for variant, rate in rates.items():
                        runs[variant].append(rate)
            for (side_by_side, ahead), rates in runs.items():
                case = f"{rows} × {columns}, weights in {where}, {side_by_side} rows at a time, prefetch {ahead} B"
                results.append(summarise(case, "packed weights", "B/s", rates, peer="plain read", peer_runs=reads))
            results.append(summarise(f"{where}: plain read of 200 MB", "read", "B/s", reads))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="only checks that it works; writes to build/bench/")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    out = result_place("gemv_variants", arguments.out, quick=arguments.quick)
    results = measure(arguments.rounds)
    for result in results:
        ratio = "" if result.ratio is None else f"  {result.ratio:.2f} × a plain read"
        print(f"{result.case}: {result.value / 1e9:.1f} GB/s{ratio}")
    print(f"wrote {write_results(out, 'gemv_variants', results)}")


if __name__ == "__main__":
    main()
