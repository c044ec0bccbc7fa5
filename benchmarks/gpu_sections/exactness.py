"""Whether the device computes what the definitions say: every kernel against its reference, and int8 against float.

Integers are equal bit for bit, floats within the bound that is named. On CUDA the cases of the products, each of which
compiles kernels of its own, are shared by several processes; those for which no time is left are counted.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.gpu_sections import ahead
from benchmarks.gpu_sections.task import NO_FP8, NO_NVFP4, Task
from nanochat_cli.config.load import resolve_config
from nanochat_cli.diagnose.validate.matmul_case import MatmulCase
from nanochat_cli.diagnose.validate.three_way_parity import (
    Corner,
    CornerName,
    all_cases,
    fewest_cases,
    quick_cases,
    require_equal,
    run_corners,
)
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.report.result_file import Result
from nanochat_kernels import (
    Form,
    Granularity,
    LinearWeight,
    PackedTernary,
    bit_linear,
    fake_quantize_activations,
    fake_ternarize,
    fp8_matmul,
    nvfp4_ternary,
    operations,
    pack_plane128,
    quantize_activations,
    quantize_input,
    ternarize,
    ternarize_rows,
    unpack,
    unpack_plane128,
)
from nanochat_kernels.four_bit import has_nvfp4
from nanochat_kernels.hyper_connections import mix_streams
from nanochat_kernels.linear_products import FP8, column_levels, fp8_product, linear_gradients
from nanochat_kernels.operations import cross_entropy_gradient, nvfp4_matmul, nvfp4_quantize
from nanochat_kernels.reference.gradient import quantize_gradient
from nanochat_kernels.reference.hyper_connections import mix_streams as mix_streams_reference

GRANULARITIES: tuple[Granularity, ...] = ("row", "tensor", 256, 128, 64)
SHAPES = ((768, 768), (768, 2816), (2816, 768), (2048, 5632))
"""Inputs and outputs of layers that are trained."""
CASES_AT_ONCE = 2
MOST_PROCESSES = 8
INT8_STEP = 2**-5
"""More than the relative error of rounding normal gradients whose largest, at most 5 σ, becomes 63 or 127."""
HALF_STEP = 2**-4
"""Largest relative error of rounding to float8_e4m3fn."""
FP8_SUM = 2**-10
"""Hopper's tensor cores add 128 products of fp8 with about 14 bits before our kernel moves them to float32."""
BF16_STEP = 2**-8
"""Largest relative error of rounding to bfloat16."""
FLOAT_SUM = 2e-5
"""Of float32 sums of a few hundred products, relative to the largest value."""


def run(task: Task) -> None:
    """Nothing is timed here, so the sections that follow have their models compiled meanwhile."""
    if task.cuda and not task.quick:
        ahead.start()
    with task.attempt("reference operations"):
        task.add(check_reference(task.device))
    with task.attempt("int8 = float"):
        task.add(check_forms(task.device, SHAPES[:1] if task.quick else SHAPES))
    with task.attempt("int8 = float, a model"):
        task.add([check_model(task.device)])
    with task.attempt("kernels of int8 gradients"):
        task.add(check_gradient_kernels(task.device, SHAPES[:1] if task.quick else SHAPES))
    with task.attempt("int8 gradients"):
        task.add(check_int8_gradients(task.device, SHAPES[:1] if task.quick else SHAPES))
    if task.has_fp8:
        with task.attempt("fp8"):
            task.add(check_fp8(task.device, SHAPES[:1] if task.quick else SHAPES))
    else:
        task.leave_out("gradients in fp8", NO_FP8)
    if has_nvfp4(task.device):
        with task.attempt("NVFP4"):
            task.add(check_nvfp4(task.device, SHAPES[:1] if task.quick else SHAPES))
    else:
        task.leave_out("products in NVFP4", NO_NVFP4)
    with task.attempt("other kernels"):
        task.add(check_others(task.device))
    with task.attempt("Triton's products" if task.cuda else "products in C"):
        check_products(task)


def equal(case: str, pairs: dict[str, tuple[Tensor, Tensor]]) -> list[Result]:
    """One result per pair of expected and found. ValidationFailure for the first that differs in a bit."""
    for name, (expected, found) in pairs.items():
        expected, found = expected.cpu(), found.cpu()
        if not torch.equal(expected, found):
            differing = int((expected != found).sum())
            raise ValidationFailure(f"{case}: {name}: {differing} of {expected.numel()} values differ")
    return [Result(case, f"{name} equal", 1.0, "1: yes, 0: no") for name in pairs]


def within(case: str, name: str, expected: Tensor, found: Tensor, bound: float) -> Result:
    """‖found − expected‖ / ‖expected‖. ValidationFailure beyond the bound, and for NaN."""
    expected, found = expected.double().cpu(), found.double().cpu()
    error = float((found - expected).norm() / expected.norm())
    if not error <= bound:
        raise ValidationFailure(f"{case}: {name} is {error:.3g} away, more than {bound:.3g}")
    return Result(case, f"relative error of {name}, at most {bound:.3g}", error, "1")


def check_reference(device: torch.device) -> list[Result]:
    """Every reference operation on `device` against the CPU."""
    generator = torch.Generator().manual_seed(0)
    # Multiples of 2⁻¹⁰ below 1 have exact sums in any order, so that the scales are equal and not only close.
    weight = torch.randint(-1023, 1024, (512, 1024), generator=generator) / 1024
    x = torch.randn(64, 1024, generator=generator) * torch.logspace(-6, 3, 64).unsqueeze(1)
    x[0] = 0.0
    codes = ternarize(weight, backend="reference").codes
    packed = pack_plane128(codes)
    here = quantize_activations(x, backend="reference")
    there = quantize_activations(x.to(device), backend="reference")
    pairs = {
        "quantize_activations: codes": (here.codes, there.codes),
        "quantize_activations: scale": (here.scale, there.scale),
        "fake_quantize_activations": (fake_quantize_activations(x), fake_quantize_activations(x.to(device))),
        "pack_plane128": (packed, pack_plane128(codes.to(device))),
        "unpack_plane128": (codes, unpack_plane128(packed.to(device), codes.shape[1])),
    }
    for granularity in GRANULARITIES:
        one, other = (ternarize(w, granularity, backend="reference") for w in (weight, weight.to(device)))
        pairs[f"ternarize, {granularity}: codes"] = one.codes, other.codes
        pairs[f"ternarize, {granularity}: scales"] = one.scales, other.scales
        pairs[f"fake_ternarize, {granularity}"] = one.dequantize(), fake_ternarize(weight.to(device), granularity)
    return equal(f"reference on {device.type} and on the CPU", pairs)


# --- forms of training ------------------------------------------------------------------------------------------------


def _layer(
    inputs: int, outputs: int, device: torch.device, rows: int = 512
) -> tuple[Tensor, Tensor, LinearWeight, Tensor]:
    """x [rows, inputs] and latent with gradients, the quantised weight, and a gradient of the output."""
    generator = torch.Generator().manual_seed(inputs + outputs)
    latent = torch.randn(outputs, inputs, generator=generator).to(device).requires_grad_()
    x = torch.randn(rows, inputs, generator=generator).to(device).requires_grad_()
    dy = torch.randn(rows, outputs, generator=generator).to(device)
    ternary = ternarize(latent.detach())
    packed = PackedTernary.pack(ternary)
    return x, latent, LinearWeight(ternary.codes.float(), packed.scales.squeeze(1), packed.packed, packed.scales), dy


def check_forms(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[Result]:
    """A layer in float32 in its forms: the same output, bit for bit, and the same gradients up to rounding."""
    results = []
    for inputs, outputs in shapes:
        x, latent, weight, dy = _layer(inputs, outputs, device)
        case = f"{inputs} inputs, {outputs} outputs, float32"
        forms: dict[str, tuple[Form, LinearWeight]] = {
            "int8": ("int8", weight),
            "int8 codes": ("int8", LinearWeight(weight.operand.to(torch.int8), weight.w_scale)),
        }
        y = bit_linear(quantize_input(x, "float"), latent, weight)
        wanted = torch.autograd.grad(y, (x, latent), dy)
        for form, (of_input, held) in forms.items():
            other = bit_linear(quantize_input(x, of_input), latent, held)
            results += equal(case, {f"{form} and float forward": (y.detach(), other.detach())})
            found = torch.autograd.grad(other, (x, latent), dy)
            for name, expected, one in zip(("dx", "dw"), wanted, found, strict=True):
                results.append(within(case, f"{name} of {form} to {name} of float", expected, one, FLOAT_SUM))
    return results


def check_model(device: torch.device) -> Result:
    """Two blocks of the small model in float32, in both forms: the same hidden states, bit for bit."""
    config = resolve_config(["nano-125m", "llama-cpp"], overrides=["model.n_layers=2", "model.vocab_size=512"])
    torch.manual_seed(0)
    model = Transformer(config.model).to(device)
    tokens = torch.randint(512, (2, 128), generator=torch.Generator().manual_seed(0)).to(device)
    hidden = []
    for form in ("float", "int8"):
        model.use_forms(form)
        with torch.no_grad():
            hidden.append(model(tokens))
    (result,) = equal("two blocks of nano-125m, float32", {"int8 and float hidden states": (hidden[0], hidden[1])})
    return result


def check_gradient_kernels(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[Result]:
    """Of two layers in bfloat16 with one input of 500 tokens, which no tile divides: as the reference on the CPU."""
    results = []
    for inputs, outputs in shapes:
        x, _, weight, dy = _layer(inputs, outputs, torch.device("cpu"), 500)
        assert weight.w_scale is not None
        codes, scale, _ = quantize_activations(x.detach(), backend="reference")
        parts = dy.bfloat16(), codes, scale.squeeze(1), weight.operand.to(torch.int8), weight.w_scale
        case = f"{inputs} inputs, {outputs} outputs, kernels of int8 gradients"
        values = {}
        for where, backend in ((torch.device("cpu"), "reference"), (device, None)):
            grads, x_codes, x_scale, operand, w_scale = (part.to(where) for part in parts)
            rounded = operations.quantize_gradient(grads, w_scale, x_scale, backend=backend)
            both = [grads, grads * 3], x_codes, x_scale, [operand, -operand], [w_scale, w_scale]
            (dx, dx_2), (dw, dw_2) = operations.int8_gradients(*both, torch.bfloat16, backend=backend)
            values[backend] = {**rounded._asdict(), "dx": dx, "second dx": dx_2, "dw": dw, "second dw": dw_2}
        results += equal(case, {name: (values["reference"][name], found) for name, found in values[None].items()})
    return results


def check_int8_gradients(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[Result]:
    """Both gradients of a layer in int8: those of the reference's codes, and near the exact ones."""
    results = []
    for inputs, outputs in shapes:
        x, _, weight, dy = _layer(inputs, outputs, device)
        assert weight.w_scale is not None
        _, codes, scale, _ = quantize_input(x.detach(), "int8")
        arguments = [dy], codes, scale, [weight.operand.to(torch.int8)], [weight.w_scale], torch.float32
        dx, (dw,) = linear_gradients(*arguments, backward="int8")
        assert dx is not None
        case = f"{inputs} inputs, {outputs} outputs, gradients in int8"
        grads, w_scale, a_scale = dy.cpu(), weight.w_scale.cpu(), scale.cpu().squeeze(1)
        rounded = quantize_gradient(grads, w_scale, a_scale, column_levels(device))
        ternary, activations = weight.operand.cpu().double(), codes.cpu().double()
        by_row = rounded.codes.double() * rounded.scale.double().unsqueeze(1)
        by_column = rounded.column_codes.double() * rounded.column_scale.double()
        exact_dx = (grads.double() * w_scale) @ ternary
        exact_dw = (grads.double() * a_scale.double().unsqueeze(1)).T @ activations
        results.append(within(case, "dx to its emulation", by_row @ ternary, dx, FLOAT_SUM))
        results.append(within(case, "dw to its emulation", by_column.T @ activations, dw, FLOAT_SUM))
        results.append(within(case, "dx to the exact one", exact_dx, dx, INT8_STEP))
        results.append(within(case, "dw to the exact one", exact_dw, dw, INT8_STEP))
    return results


def check_fp8(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[Result]:
    """The fp8 gradient of an input: as its emulation says, and no further from the exact one than fp8 rounds."""
    results = []
    for inputs, outputs in shapes:
        _, _, weight, dy = _layer(inputs, outputs, device)
        case = f"{inputs} inputs, {outputs} outputs, gradient of the input in fp8"
        found = fp8_product(dy, weight.operand)
        scale = dy.abs().amax(dim=1, keepdim=True) / torch.finfo(FP8).max
        rounded = (dy / scale).to(FP8).double() * scale.double()
        exact = weight.operand.double()
        results.append(within(case, "the product to its emulation", rounded @ exact, found, 2**-8))
        results.append(within(case, "the gradient to the exact one", dy.double() @ exact, found, HALF_STEP))
    return results


def check_nvfp4(device: torch.device, shapes: Sequence[tuple[int, int]]) -> list[Result]:
    """Bytes of activations equal to the reference's, products up to a float32 sum; with rows that are not aligned."""
    results = []
    for inputs, outputs in (*shapes, (400, 72)):
        generator = torch.Generator().manual_seed(inputs + outputs)
        spread = torch.exp2(torch.randn(500, inputs // 16, generator=generator) * 4).repeat_interleave(16, dim=1)
        x = torch.randn(500, inputs, generator=generator) * spread
        x[0], x[1, 16:32] = 0.0, 0.0
        case = f"{inputs} inputs, {outputs} outputs, NVFP4"
        for dtype in (torch.float32, torch.bfloat16):
            expected = nvfp4_quantize(x.to(dtype), backend="reference")
            found = nvfp4_quantize(x.to(device, dtype))
            pairs = {
                f"bytes of {dtype}": (expected.packed, found.packed),
                f"scale of {dtype}": (expected.scale, found.scale),
            }
            results += equal(case, pairs)
        weight = nvfp4_ternary(torch.randint(-1, 2, (outputs, inputs), generator=generator))
        (packed, scale), w_scale = nvfp4_quantize(x, backend="reference"), torch.rand(outputs, 1, generator=generator)
        product = nvfp4_matmul(packed, scale, weight, w_scale, backend="reference")
        packed, scale, weight, w_scale = (operand.to(device) for operand in (packed, scale, weight, w_scale))
        here = nvfp4_matmul(packed, scale, weight, w_scale)
        results.append(within(case, "the product to the reference", product, here, FLOAT_SUM))
    return results


# --- the other kernels ------------------------------------------------------------------------------------------------


def check_others(device: torch.device) -> list[Result]:
    """Kernels that the cases of products do not reach: fp8 products, unpacked types, weights refreshed together,
    streams, the loss of the head.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, 512, generator=generator).to(FP8) for rows in (100, 192))
    a_scale, b_scale = torch.rand(100, 1, generator=generator), torch.rand(192, 1, generator=generator)
    expected = fp8_matmul(a, b, a_scale, b_scale, backend="reference")
    found = fp8_matmul(*(t.to(device) for t in (a, b, a_scale, b_scale)))
    results = [within("fp8_matmul 100×512×192", "the product", expected, found, FP8_SUM)]
    packed = PackedTernary.pack(ternarize(torch.randn(192, 512, generator=generator)))
    for dtype in (torch.int8, torch.bfloat16, torch.float32, FP8):
        pair = unpack(packed, dtype, backend="reference").float(), unpack(packed.to(device), dtype).float()
        results += equal("unpack 192×512", {str(dtype): pair})
    results += _check_refreshed(device, generator)
    for streams in (2, 4):
        x = torch.randn(2, 3, streams, 600, generator=generator)
        weights, y = torch.randn(2, 3, streams, streams + 1, generator=generator), torch.randn(2, 3, 600)
        ways = ((mix_streams_reference, torch.device("cpu")), (mix_streams, device))
        values = [_mixed(mix, [x, weights, y], to) for mix, to in ways]
        for name, one, other in zip(("streams", "dx", "dweights", "dy"), *values, strict=True):
            results.append(within(f"mix_streams, {streams} streams", name, one, other, FLOAT_SUM))
    return [*results, *_check_loss(device, generator)]


def _check_refreshed(device: torch.device, generator: torch.Generator) -> list[Result]:
    """What weights are held in, refreshed together; two of one shape share a launch."""
    latents = [torch.randn(rows, 640, generator=generator) for rows in (192, 100, 192)]
    held = [[], []]
    for found, to in zip(held, (torch.device("cpu"), device), strict=True):
        for latent in latents:
            scales, codes = (torch.empty(len(latent), n, device=to) for n in (1, 640))
            found.append(
                (scales, codes.to(torch.bfloat16), torch.empty(len(latent), 160, dtype=torch.uint8, device=to))
            )
        ternarize_rows([latent.to(to) for latent in latents], *zip(*found, strict=True))
    pairs = {
        f"{name} of weight {i}": pair
        for i, weights in enumerate(zip(*held, strict=True))
        for name, pair in zip(("scales", "codes", "packed bytes"), zip(*weights, strict=True), strict=True)
    }
    return equal("ternarize_rows, three weights", pairs)


def _check_loss(device: torch.device, generator: torch.Generator) -> list[Result]:
    """Rows of more than one block, the last of them not full, every seventh ignored."""
    results = []
    targets = torch.randint(20000, (100,), generator=generator)
    targets[::7] = -100
    factor = torch.rand(100, generator=generator)
    for dtype, bound in ((torch.float32, FLOAT_SUM), (torch.bfloat16, BF16_STEP)):
        logits = (torch.randn(100, 20000, generator=generator) * 3).to(dtype)
        found = cross_entropy_gradient(*(t.to(device, copy=True) for t in (logits, targets, factor)))
        expected = cross_entropy_gradient(logits.float(), targets, factor, backend="reference")
        case = f"cross_entropy_gradient 100×20000, {dtype}"
        results.append(within(case, "losses", expected[0], found[0], FLOAT_SUM))
        results.append(within(case, "the gradient", expected[1], found[1], bound))
    return results


def _mixed(mix: Callable[..., Tensor], arguments: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The mixture and its gradients."""
    moved = [argument.to(device).requires_grad_() for argument in arguments]
    out = mix(*moved)
    return [out.detach(), *torch.autograd.grad(out, moved, torch.cos(out.detach()))]


# --- products ---------------------------------------------------------------------------------------------------------


def check_products(task: Task) -> None:
    """Cases of `nanochat validate`, short ones first, until they or the time are over."""
    if not task.cuda:
        corner = compare(fewest_cases() if task.quick else quick_cases(), "cpu")
        task.add([_compared(corner)])
        return
    first = quick_cases()
    cases = fewest_cases() if task.quick else [*first, *(case for case in all_cases() if case not in first)]
    corner, left = Corner("triton", torch.cuda.get_device_name(task.device)), len(cases)
    for part in _in_processes(task, cases):
        corner.cases += part.cases
        corner.comparisons += part.comparisons
        left -= part.cases
        corner.differences += part.differences
        for reason, names in part.unsupported.items():
            corner.unsupported.setdefault(reason, set()).update(names)
    if left:
        task.leave_out(f"{left} of {len(cases)} cases of products", "no time was left")
    task.details["differences"] = corner.differences
    require_equal([corner], required=["triton"])
    task.add([_compared(corner)])


def compare(cases: Sequence[MatmulCase], corner: CornerName) -> Corner:
    """All operations of the cases against the reference, in this process."""
    return run_corners(cases, QuietReporter(), [corner])[corner]


def _compared(corner: Corner) -> Result:
    require_equal([corner], required=[corner.name])
    case = f"{corner.cases} cases, {corner.form}"
    return Result(case, "results equal to the reference", float(corner.comparisons), "results")


def _in_processes(task: Task, cases: Sequence[MatmulCase]) -> Iterator[Corner]:
    """Results of a few cases at a time, in the order in which they are ready, while time is left.

    A process that breaks gives a corner with a difference that says how.
    """
    processes = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) // 2))
    parts = [cases[start : start + CASES_AT_ONCE] for start in range(0, len(cases), CASES_AT_ONCE)]
    pool = ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(2,)
    )
    waiting = {pool.submit(compare, part, "triton"): part for part in parts}
    while waiting and task.left() > 0:
        for future in wait(waiting, task.left(), FIRST_COMPLETED).done:
            part = waiting.pop(future)
            if (error := future.exception()) is None:
                yield future.result()
            else:
                lines = str(error).splitlines() or [""]
                how = f"{part[0]} and the next: {type(error).__name__}: {lines[0]}"
                yield Corner("triton", "", cases=len(part), differences=[how])
    pool.shutdown(wait=False, cancel_futures=True)
