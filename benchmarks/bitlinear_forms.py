"""Which form of the ternary product trains faster at each shape: forward and backward, compiled, alternating.

    python benchmarks/bitlinear_forms.py [--quick] [--rounds 9] [--rows 2048]
    python benchmarks/bitlinear_forms.py --from benchmarks/results/gpu/forms.json

Writes benchmarks/results/bitlinear_forms.json and, without --quick, the table that `choose_form` reads
(kernels/nanochat_kernels/training_forms.json); with --from only the table, from a result measured elsewhere, which
`benchmarks/gpu.py` writes on a GPU. A layer is the same as in a block: RMSNorm, quantisation, product; the float twin
is RMSNorm and F.linear. In bfloat16 on CUDA, else in float32.
"""

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_cli.report.environment import environment
from nanochat_cli.report.result_file import Result, result_place, summarise, write_results
from nanochat_kernels import Backward, Form, LinearWeight, PackedTernary, bit_linear, quantize_input, ternarize

SHAPES = [(256, 256), (256, 768), (512, 512), (512, 1536), (768, 768), (768, 2816), (1024, 3584), (2048, 2048)]
"""Inputs and outputs of a layer."""
ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "kernels" / "nanochat_kernels" / "training_forms.json"
TWIN = "float twin"
COMPARED = "int8 against float"
"""The metric whose ratio goes into the table."""


class Layer(NamedTuple):
    """A form of the product, forward and backward."""

    form: Form
    backward: Backward = "exact"


FORMS = {"float": Layer("float"), "int8": Layer("int8")}
LOW_PRECISION = {"int8, int8 gradients": Layer("int8", "int8"), "int8, fp8 dX": Layer("int8", "fp8")}
"""Forms whose gradients are rounded. fp8 on a GPU."""
ON_CPU = {"int8, bf16 gradients": Layer("int8", "bf16"), "int8, int8 gradients": Layer("int8", "int8")}


def contenders(
    n_inputs: int, n_outputs: int, rows: int, device: torch.device, forms: Mapping[str, Layer] = FORMS
) -> dict[str, Callable[[], float]]:
    """Seconds of one forward and backward pass of each form and of the float twin."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(n_outputs, n_inputs, generator=generator).to(device).requires_grad_()
    x = torch.randn(rows, n_inputs, generator=generator).to(device, dtype).requires_grad_()
    dy = torch.randn(rows, n_outputs, generator=generator).to(device, dtype)
    ternary = ternarize(latent.detach())
    packed = PackedTernary.pack(ternary)
    w_scale = packed.scales.squeeze(1)
    weight = LinearWeight(ternary.codes.to(dtype), w_scale, packed.packed, packed.scales)
    cuda = device.type == "cuda"  # as `BitLinear` holds them
    turned = ternary.codes.T.contiguous() if cuda else None
    in_int8 = LinearWeight(ternary.codes, w_scale, None, packed.scales, turned)

    def layer(how: Layer) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            quantized = quantize_input(torch.nn.functional.rms_norm(x, (n_inputs,)), how.form)
            one_copy = how.backward == "int8" or (cuda and how.form == "int8")
            return bit_linear(quantized, latent, in_int8 if one_copy else weight, backward=how.backward)

        return forward

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

    return {**{name: timed(layer(how)) for name, how in forms.items()}, TWIN: timed(twin)}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    shape: tuple[int, int], rows: int, rounds: int, device: torch.device, forms: Mapping[str, Layer] = FORMS
) -> list[Result]:
    """Every form against the float twin, and COMPARED."""
    n_inputs, n_outputs = shape
    torch.compiler.reset()
    runs = contenders(n_inputs, n_outputs, rows, device, forms)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            elapsed = run()
            if turn >= 2:  # the first compiles, the second warms up
                seconds[name].append(elapsed)
    case = f"{device.type}: {n_inputs} inputs, {n_outputs} outputs, {rows} rows"
    pairs = [(f"forward and backward, {name}", name, TWIN, TWIN) for name in forms]
    return [
        summarise(case, metric, "s", seconds[name], peer=peer, peer_runs=seconds[theirs], smaller_is_better=True)
        for metric, name, peer, theirs in [*pairs, (COMPARED, "int8", "float form", "float")]
    ]


def write_table(results: Sequence[Result], measured_in: Mapping[str, Any]) -> None:
    """Replace the rows of the kinds of device that were measured, and keep the others."""
    new = []
    for result in results:
        if result.metric == COMPARED:
            found = re.match(r"(\w+): (\d+) inputs, (\d+) outputs", result.case)
            assert found is not None, result.case
            row = {"device": found[1], "in": int(found[2]), "out": int(found[3])}
            new.append({**row, "int8_speedup": round(result.ratio or 0.0, 3)})
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    devices = {row["device"] for row in new}
    kept = [row for row in table["shapes"] if row["device"] not in devices]
    environments = {**table["environments"], **{device: dict(measured_in) for device in devices}}
    table = {"measured_by": "benchmarks/bitlinear_forms.py", "environments": environments, "shapes": [*kept, *new]}
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {TABLE}; median speed-up of int8: {statistics.median(row['int8_speedup'] for row in new):.2f} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small shape: only a check that it works")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=2048, help="tokens of a micro-batch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--from", dest="measured", type=Path, metavar="FILE", help="write the table from this result")
    arguments = parser.parse_args()
    if arguments.measured is not None:
        document = json.loads(arguments.measured.read_text(encoding="utf-8"))
        write_table([Result(**result) for result in document["results"]], document["environment"])
        return
    out = result_place("bitlinear_forms", arguments.out, quick=arguments.quick)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, rows = (SHAPES[:1], 256) if arguments.quick else (SHAPES, arguments.rows)
    results: list[Result] = []
    for shape in shapes:
        for result in measure(shape, rows, arguments.rounds, device, FORMS | ON_CPU):
            print(f"{result.case}: {result.metric} {result.value * 1e3:.2f} ms, {result.ratio:.2f} × {result.peer}")
            results.append(result)
    if not arguments.quick:
        write_table(results, environment())
    print(f"wrote {write_results(out, 'bitlinear_forms', results)}")


if __name__ == "__main__":
    main()
