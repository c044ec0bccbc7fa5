"""CPU kernels, Triton kernels and llama.cpp, the three corners, compute the same products as the reference.

The reference is the definition. Integers (codes, sums, unpacked weights, the int dots of products) are equal, floats
within 1e-5 of the summed magnitudes. For llama.cpp only products are compared, not how it quantises. Triton runs on the
GPU if there is one, else under its interpreter in a child process, with part of the rows of large matrices. A corner
that cannot run here says why; nothing is skipped silently.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from nanochat_cli.diagnose.validate.matmul_case import NORM_EPS, Activations, MatmulCase, Results, Weights, compute
from nanochat_cli.diagnose.validate.matmul_parity import llama_cpp_product, tensor_type
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.export import llama_cpp
from nanochat_cli.report.reporter import Reporter
from nanochat_kernels import Granularity
from nanochat_kernels.backends import Backend, Unsupported

RELATIVE_TOLERANCE = 1e-5
NEAR_TIE = 1e-3
"""After a norm or a gate, correct programs may differ in rounding a value this close to halfway between two codes."""
NEAR_INTEGER = 0.1
"""How far a product from llama.cpp may be from an integer, since its log-probabilities are float32."""
INTERPRETED_ROWS, INTERPRETED_VECTOR_ROWS, INTERPRETED_WEIGHTS = 33, 5, 100_000
"""Limits for the interpreter: rows of a matrix (for few tokens, which take one program per row, the second), and
weights."""
FEW_TOKENS = 4
CHILD_TIMEOUT = 1800.0

SHAPES: tuple[tuple[int, int], ...] = (
    *((128, 128), (256, 256), (512, 512), (2048, 2048), (4096, 11008), (11008, 4096)),
    *((127, 128), (1, 4096), (17, 128), (33, 256), (63, 384), (65, 256)),
)
"""Rows × columns of the weight."""
ODD_TOKENS = (1, 3, 7, 65)
GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor", 256, 128, 64)
LARGE = 2_000_000
"""Matrices with more weights get only two cases: the small shapes cover the other forms."""

CornerName = Literal["cpu", "triton", "llama.cpp"]
CORNERS: tuple[CornerName, ...] = ("cpu", "triton", "llama.cpp")


@dataclass
class Corner:
    """The outcome of one corner. unsupported: reason -> operations that it cannot do here."""

    name: CornerName
    form: str
    cases: int = 0
    comparisons: int = 0
    differences: list[str] = field(default_factory=list)
    unsupported: dict[str, set[str]] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """equal, different, or absent."""
        return "different" if self.differences else "equal" if self.comparisons else "absent"

    def compare(self, case: MatmulCase, results: Results, expected: Results) -> None:
        self.cases += 1
        for name, tensor in results.items():
            self.comparisons += 1
            if difference := differs(case, name, expected[name], tensor):
                self.differences.append(f"{case}: {name}: {difference}")

    def lacks(self, what: str, reason: str) -> None:
        self.unsupported.setdefault(reason, set()).add(what)


def quick_cases() -> list[MatmulCase]:
    """A selection that takes seconds and still has every granularity, odd sizes and the special values."""
    return [
        MatmulCase(127, 128, 1, "row"),
        MatmulCase(127, 128, 7, 64),
        MatmulCase(17, 128, 3, "tensor"),
        MatmulCase(33, 256, 3, 256),
        MatmulCase(33, 256, 7, 128),
        MatmulCase(63, 384, 1, 128),
        MatmulCase(63, 384, 7, "row"),
        MatmulCase(65, 256, 3, 64),
        MatmulCase(65, 256, 65, "tensor"),
        MatmulCase(33, 256, 65, 128),
        MatmulCase(1, 4096, 1, "row"),
        *special_cases(33, 256, 3)[::2],
        *special_cases(17, 128, 7)[1::2],
    ]


def fewest_cases() -> list[MatmulCase]:
    """A few of `quick_cases` for a first look: scales per row and per group, one token and several, zero weights."""
    return [MatmulCase(127, 128, 1, "row"), MatmulCase(33, 256, 7, 128), *special_cases(17, 128, 7)[:1]]


def all_cases() -> list[MatmulCase]:
    """Every shape, granularity and odd number of tokens; two cases for each large matrix."""
    cases: list[MatmulCase] = []
    for rows, columns in SHAPES:
        if rows * columns > LARGE:
            cases += [MatmulCase(rows, columns, 1, "row"), MatmulCase(rows, columns, 7, 256)]
        else:
            cases += [MatmulCase(rows, columns, m, g) for g in GRANULARITIES if _fits(columns, g) for m in ODD_TOKENS]
    return [*cases, *special_cases(65, 256, 7), *special_cases(63, 384, 65)]


def special_cases(rows: int, columns: int, tokens: int) -> list[MatmulCase]:
    """All-zero and all-±1 weights, zero activations, and the smallest and largest scales."""
    kinds: list[tuple[Weights, Activations]] = [("zeros", "random"), ("signs", "random"), ("random", "zeros")]
    granularities: tuple[Granularity, ...] = ("row", 128)
    cases = [
        MatmulCase(rows, columns, tokens, granularity, weights, activations)
        for weights, activations in kinds
        for granularity in granularities
    ]
    for scale in (1e-5, 65504.0):
        cases += [MatmulCase(rows, columns, tokens, granularity, magnitude=scale) for granularity in granularities]
        cases += [
            MatmulCase(rows, columns, tokens, granularity, activation_magnitude=scale) for granularity in granularities
        ]
    return cases


def run_corners(
    cases: Sequence[MatmulCase], reporter: Reporter, corners: Sequence[CornerName] = CORNERS
) -> dict[CornerName, Corner]:
    """Compute the cases in every corner and compare. A corner that cannot run is included, with its reason."""
    with reporter.progress("comparing kernels", len(cases) * len(corners), "cases") as progress:
        return {name: _RUNNERS[name](cases, progress.advance) for name in corners}


def require_equal(corners: Iterable[Corner], required: Iterable[CornerName]) -> None:
    """Raise ValidationFailure for the first difference, and for a required corner that compared nothing."""
    for corner in corners:
        if corner.differences:
            more = f" (and {len(corner.differences) - 1} more)" if len(corner.differences) > 1 else ""
            raise ValidationFailure(f"kernels: {corner.name} differs from the reference: {corner.differences[0]}{more}")
        if corner.name in required and (corner.unsupported or not corner.comparisons):
            reason = "; ".join(f"{', '.join(sorted(what))}: {why}" for why, what in corner.unsupported.items())
            raise ValidationFailure(f"kernels: {corner.name} must run here and does not: {reason}")


# --- the corners ------------------------------------------------------------------------------------------------------


def _in_process(
    corner: Corner, backend: Backend, device: str, cases: Sequence[MatmulCase], advance: Callable[[], None]
) -> Corner:
    for case in cases:
        try:
            results, missing = compute(case, backend, device)
        except Unsupported as reason:
            corner.lacks("everything", str(reason))
            return corner
        for operation, reason in missing.items():
            corner.lacks(operation, reason)
        corner.compare(case, results, reference(case))
        advance()
    return corner


def _cpu(cases: Sequence[MatmulCase], advance: Callable[[], None]) -> Corner:
    return _in_process(Corner("cpu", "compiled C"), "cpu", "cpu", cases, advance)


def _triton(cases: Sequence[MatmulCase], advance: Callable[[], None]) -> Corner:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return _in_process(Corner("triton", name), "triton", "cuda", cases, advance)
    return _interpreted(cases, advance)


def _interpreted(cases: Sequence[MatmulCase], advance: Callable[[], None]) -> Corner:
    corner = Corner("triton", "interpreter")
    parts = list(dict.fromkeys(map(part, cases)))
    with tempfile.TemporaryDirectory(prefix="nanochat-triton-") as folder:
        asked, answered = Path(folder, "cases.json"), Path(folder, "results.safetensors")
        asked.write_text(json.dumps([asdict(case) for case in parts]), encoding="utf-8")
        command = [sys.executable, "-m", "nanochat_cli.diagnose.validate.triton_child", str(asked), str(answered)]
        with (Path(folder) / "log").open("w+", encoding="utf-8") as log:
            # The interpreter computes thousands of tiny blocks, on which threads would mostly wait for each other.
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
            assert child.stdout is not None
            for _ in child.stdout:
                advance()
            if child.wait(CHILD_TIMEOUT):
                log.seek(0)
                lines = [line.strip() for line in log if line.strip()] or [f"exit code {child.returncode}"]
                corner.lacks("everything", lines[-1])
                return corner
        with safe_open(answered, "pt") as file:
            missing = file.metadata() or {}
            if "everything" in missing:
                corner.lacks("everything", missing["everything"])
                return corner
            names = list(file.keys())
            for number, case in enumerate(parts):
                prefix = f"{number}/"
                results = {
                    name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)
                }
                for operation, reason in json.loads(missing[str(number)]).items():
                    corner.lacks(operation, reason)
                corner.compare(case, results, reference(case))
    return corner


def _llama_cpp(cases: Sequence[MatmulCase], advance: Callable[[], None]) -> Corner:
    corner = Corner("llama.cpp", "xllamacpp, its own CPU kernels")
    if not llama_cpp.is_available():
        corner.lacks("everything", "xllamacpp is not installed: install the extra [llama-cpp]")
        return corner
    for case in cases:
        if tensor_type(case) is None:
            corner.lacks(str(case), "no type for these columns and scales")
        else:
            corner.cases += 1
            corner.comparisons += 2
            corner.differences += [f"{case}: {line}" for line in _differs_in_llama_cpp(case, reference(case))]
        advance()
    return corner


def _differs_in_llama_cpp(case: MatmulCase, expected: Results) -> list[str]:
    """Integers must be equal, values within the tolerance of the largest one, as float32 log-probabilities allow."""
    product = llama_cpp_product(case)
    integers = torch.from_numpy(product.integers)
    values = torch.from_numpy(product.values)
    whole = expected["ternary_matmul.integers"].double()
    scaled = (expected["ternary_matmul.values"].double() / case.grid_scale)[:, : values.shape[1]]
    differences = {
        "integers": _worst((integers - whole).abs() > NEAR_INTEGER, whole, integers),
        "values": _worst((values - scaled).abs() > RELATIVE_TOLERANCE * scaled.abs().max(), scaled, values),
    }
    return [f"ternary_matmul.{name}: {difference}" for name, difference in differences.items() if difference]


_RUNNERS: dict[CornerName, Callable[[Sequence[MatmulCase], Callable[[], None]], Corner]] = {
    "cpu": _cpu,
    "triton": _triton,
    "llama.cpp": _llama_cpp,
}


def part(case: MatmulCase) -> MatmulCase:
    """The part of a case for the interpreter: all columns and tokens, but only as many rows as take a second."""
    most = INTERPRETED_VECTOR_ROWS if case.tokens <= FEW_TOKENS else INTERPRETED_ROWS
    return replace(case, rows=min(case.rows, most, max(1, INTERPRETED_WEIGHTS // case.columns)))


# --- comparing --------------------------------------------------------------------------------------------------------


def reference(case: MatmulCase) -> Results:
    return compute(case, "reference")[0]


def differs(case: MatmulCase, name: str, expected: Tensor, found: Tensor) -> str | None:
    """How a result differs from the reference, if it does."""
    operation, part_name = name.split(".")
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} instead of {list(expected.shape)}"
    if operation in ("rmsnorm_quantize", "swiglu_quantize"):
        return _differs_after_a_float_function(case, operation, part_name, expected, found)
    if part_name == "values":
        off = (found.double() - expected.double()).abs()
        return _worst(off > RELATIVE_TOLERANCE * summed_magnitudes(case), expected, found)
    if found.dtype != expected.dtype:
        return f"{found.dtype} instead of {expected.dtype}"
    return _worst(found != expected, expected, found)


def summed_magnitudes(case: MatmulCase) -> Tensor:
    """Σ_g |scale_g · int dot_g| · activation scale, to which rounding errors are relative: [tokens, rows]."""
    codes, grid = case.ternary.codes.double(), case.grid.double()
    group = case.group or case.columns
    total = torch.zeros(case.tokens, case.rows, dtype=torch.float64)
    for g, inputs in enumerate(torch.arange(case.columns).split(group)):
        total += (grid[:, inputs] @ codes[:, inputs].T).abs() * case.packed.scales[:, g]
    return total * case.grid_scale


def _differs_after_a_float_function(
    case: MatmulCase, operation: str, part_name: str, expected: Tensor, found: Tensor
) -> str | None:
    """Norms and gates are float functions: scales must be within the tolerance, codes equal except for ties."""
    if part_name == "scale":
        return _worst((found - expected).abs() > RELATIVE_TOLERANCE * expected.abs(), expected, found)
    x = case.x.double()
    if operation == "rmsnorm_quantize":
        exact = x * (x.pow(2).mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt() * case.norm_weight
    else:
        exact = torch.nn.functional.silu(x) * case.other
    steps = exact / (exact.abs().amax(dim=-1, keepdim=True).clamp(min=1e-5) / 127)
    tie = ((steps.abs() % 1) - 0.5).abs() < NEAR_TIE
    if part_name == "codes":
        off = (found.int() - expected.int()).abs()
        return _worst((off > 1) | (off == 1) & ~tie, expected, found)
    ties = tie.reshape(*expected.shape, -1).sum(dim=-1)
    return _worst((found - expected).abs() > ties, expected, found)


def _worst(wrong: Tensor, expected: Tensor, found: Tensor) -> str | None:
    if not bool(wrong.any()):
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    values = f"{found[at].item():g} instead of {expected[at].item():g}"
    return f"{int(wrong.sum())} of {wrong.numel()} values, first at {list(at)}: {values}"


def _fits(columns: int, granularity: Granularity) -> bool:
    return isinstance(granularity, str) or columns % granularity == 0
