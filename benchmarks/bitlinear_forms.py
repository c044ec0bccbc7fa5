"""Which form of the ternary product trains faster at each shape: forward and backward, compiled, alternating.

    python benchmarks/bitlinear_forms.py [--quick] [--rounds 9] [--rows 2048]

Writes benchmarks/results/bitlinear_forms.json and, without --quick, the table that `choose_form` reads
(kernels/nanochat_kernels/training_forms.json). A layer is the same as in a block: RMSNorm, quantisation, product; the
float twin is RMSNorm and F.linear. In bfloat16 on CUDA, else in float32.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from nanochat_cli.report.environment import environment
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results
from nanochat_kernels import Form, LinearWeight, PackedTernary, bit_linear, quantize_input, ternarize

SHAPES = [(256, 256), (256, 768), (512, 512), (512, 1536), (768, 768), (768, 2816), (1024, 3584), (2048, 2048)]
"""Inputs and outputs of a layer."""
FORMS: tuple[Form, ...] = ("float", "int8")
ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "kernels" / "nanochat_kernels" / "training_forms.json"


def contenders(n_inputs: int, n_outputs: int, rows: int, device: torch.device) -> dict[str, Callable[[], float]]:
    """Seconds of one forward and backward pass of each form and of the float twin."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(n_outputs, n_inputs, generator=generator).to(device).requires_grad_()
    x = torch.randn(rows, n_inputs, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(rows, n_outputs, generator=generator).to(device, dtype)
    ternary = ternarize(latent.detach())
    packed = PackedTernary.pack(ternary)
    weight = LinearWeight(ternary.codes.float(), packed.scales.squeeze(1), packed.packed, packed.scales)

    def layer(form: Form) -> Callable[[Tensor], Tensor]:
        return lambda x: bit_linear(quantize_input(torch.nn.functional.rms_norm(x, (n_inputs,)), form), latent, weight)

    def twin(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(torch.nn.functional.rms_norm(x, (n_inputs,)), latent.to(dtype))

    def timed(forward: Callable[[Tensor], Tensor]) -> Callable[[], float]:
        compiled = torch.compile(forward, dynamic=False)

        def run() -> float:
            _wait(device)
            started = time.perf_counter()
            torch.autograd.grad(compiled(x), (x, latent), dy)
            _wait(device)
            return time.perf_counter() - started

        return run

    return {**{form: timed(layer(form)) for form in FORMS}, "float twin": timed(twin)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shapes: list[tuple[int, int]], rows: int, rounds: int, device: torch.device) -> list[Result]:
    results = []
    for n_inputs, n_outputs in shapes:
        torch.compiler.reset()
        runs = contenders(n_inputs, n_outputs, rows, device)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(rounds + 2):
            for name, run in runs.items():
                elapsed = run()
                if turn >= 2:  # the first compiles, the second warms up
                    seconds[name].append(elapsed)
        case = f"{device.type}: {n_inputs} inputs, {n_outputs} outputs, {rows} rows"
        for form in FORMS:
            name, peer = f"forward and backward, {form}", seconds["float twin"]
            results.append(
                summarise(case, name, "s", seconds[form], peer="float twin", peer_runs=peer, smaller_is_better=True)
            )
        results.append(
            summarise(
                case,
                "int8 against float",
                "s",
                seconds["int8"],
                peer="float form",
                peer_runs=seconds["float"],
                smaller_is_better=True,
            )
        )
        for result in results[-3:]:
            print(
                f"{case}: {result.metric} {result.value * 1e3:.2f} ms, {result.ratio:.2f} × {result.peer}", flush=True
            )
    return results


def write_table(results: list[Result], shapes: list[tuple[int, int]], device: torch.device) -> None:
    """Replace the rows of this kind of device and keep the others."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    kept = [row for row in table["shapes"] if row["device"] != device.type]
    ratios = [result.ratio for result in results if result.metric == "int8 against float"]
    new = [
        {"device": device.type, "in": n_inputs, "out": n_outputs, "int8_speedup": round(ratio or 0.0, 3)}
        for (n_inputs, n_outputs), ratio in zip(shapes, ratios, strict=True)
    ]
    table = {"measured_by": "benchmarks/bitlinear_forms.py", "environment": environment(), "shapes": [*kept, *new]}
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TABLE}; median speed-up of int8: {statistics.median(row['int8_speedup'] for row in new):.2f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: only a check that it works")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=2048, help="tokens of a micro-batch")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    out = result_place("bitlinear_forms", arguments.out, quick=arguments.quick)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rows = (SHAPES[:1], 256) if arguments.quick else (SHAPES, arguments.rows)
    results = measure(shapes, rows, arguments.rounds, device)
    if not arguments.quick:
        write_table(results, shapes, device)
    print(f"wrote {write_results(out, 'bitlinear_forms', results)}")


if __name__ == "__main__":
    main()
