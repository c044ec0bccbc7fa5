"""What the Triton kernels compile to, without a GPU: registers, shared memory and instructions per weight.

    python benchmarks/kernel_aot.py [--architectures 80 90 100] [--essential] [--out FILE]

Instruction counts come from the machine code of ptxas; no time is measured. Lane-instructions per weight are those of
the inner loop: instructions x 32 x warps / weights. Takes minutes without a warm Triton cache.
"""

import argparse
import dataclasses
import os
from pathlib import Path

from nanochat_cli.report.result_file import Claim, Result, result_place, write_results

DECODE_LIMITS = {"gemv_row_kernel": 0.8, "gemv_group_kernel": 1.4}
METRIC = "lane-instructions per weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--essential", action="store_true", help="only the kernels that the default tests compile")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("kernel_aot", arguments.out)
    # Interpreted kernels cannot be compiled, and the choice is made when triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    import triton

    from nanochat_kernels.triton_kernels.ahead_of_time import Figures, compile_all

    def report(figures: Figures) -> None:
        per_weight = figures.lane_instructions_per_weight
        print(
            f"sm_{figures.architecture:<4}{figures.kernel:<24}{figures.registers:>4} registers"
            f" {figures.stack:>4} B stack {figures.shared:>7} B shared {figures.instructions:>5} instructions"
            f" {'' if per_weight is None else f'{per_weight:.3f} a weight':<16} {figures.case}",
            flush=True,
        )

    kernels = compile_all(arguments.architectures, arguments.essential, report)
    results = [
        Result(f"sm_{k.architecture} {k.kernel}, {k.case}", METRIC, k.lane_instructions_per_weight, "instructions")
        for k in kernels
        if k.lane_instructions_per_weight is not None
    ]
    spilling = [k for k in kernels if k.stack or k.local_accesses]
    claims = [
        Claim(
            "no-spills",
            f"none of {len(kernels)} compiled kernels spills registers",
            "this script",
            "0 kernels",
            f"{len(spilling)} kernels",
            "not supported" if spilling else "supported",
        )
    ]
    for kernel, limit in DECODE_LIMITS.items():
        # A row shorter than the tile is read at once, so the loop that was counted is never entered.
        counts = [
            k.lane_instructions_per_weight
            for k in kernels
            if k.kernel == kernel and "M=1," in k.case and "768x768" not in k.case and k.lane_instructions_per_weight
        ]
        claims.append(
            Claim(
                f"{kernel}-instructions",
                f"{METRIC} of {kernel} for one token",
                "this script",
                f"at most {limit}",
                f"{min(counts):.3f} to {max(counts):.3f}",
                "supported" if max(counts) <= limit else "not supported",
            )
        )
    rows = [dataclasses.asdict(k) for k in kernels]
    print(f"wrote {write_results(out, 'kernel-aot', results, claims, triton=triton.__version__, kernels=rows)}")


if __name__ == "__main__":
    main()
