"""Compile what the launchers would launch, for absent GPUs, and read the machine code.

    python -m nanochat_kernels.triton_kernels.ahead_of_time [--all] [--architectures 80 90 100] [--cases nvfp4]

prints one JSON line per kernel. The launchers run on meta tensors while `launch.record` collects their calls, so a
kernel is compiled with the argument types, alignments and tile sizes that it would have. Needs triton with its bundled
ptxas and no GPU; TRITON_INTERPRET must not be set.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanochat_kernels.reference.activations import QuantizedActivations
from nanochat_kernels.reference.packed import PackedTernary
from nanochat_kernels.triton_kernels import hyper_connections, operations, sass
from nanochat_kernels.triton_kernels.launch import Launch, record
from nanochat_kernels.triton_kernels.small_matmul import ternary_small_matmul
from nanochat_kernels.triton_kernels.ternarize import ternarize_forms, ternarize_rows

BLACKWELL = (100, 103, 120)
MAC_INSTRUCTIONS = (*sass.TENSOR_CORE, sass.DP4A)

_FLOAT_OPERATION = re.compile(r"\b((?:add|sub|mul|fma|div|rcp|sqrt|rsqrt|ex2)\.[a-z.]*f(?:32|64))\b")

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class MetaCall:
    """One call of an operation on meta tensors. essential: one of each family, which the default tests compile."""

    name: str
    call: Callable[[], Any]
    essential: bool = False
    architectures: tuple[int, ...] = (80, 90, 100)


@dataclass(frozen=True)
class Figures:
    """A compiled kernel. Registers and stack (spills) per thread, shared memory in bytes per program.

    multiply_adds: how often each dp4a or tensor-core instruction occurs in the code. loop_instructions: those of the
    inner loop, from which lane_instructions_per_weight = instructions · 32 · warps / weights handled; None if the
    kernel has no such loop. loop_barriers: how often a program waits for all its threads in one iteration.
    global_accesses: loads and stores of memory in the code, by their bits per lane.
    float_operations: arithmetic on float32 and float64 in the PTX, which says how each operation rounds.
    """

    case: str
    kernel: str
    architecture: int
    constants: dict[str, int | bool | str]
    num_warps: int
    num_stages: int
    registers: int
    stack: int
    local_accesses: int
    shared: int
    instructions: int
    global_accesses: dict[str, int]
    multiply_adds: dict[str, int]
    loop_instructions: int | None
    loop_barriers: int | None
    float_operations: dict[str, int]
    lane_instructions_per_weight: float | None


def weight(rows: int, columns: int, group: int | None = None) -> PackedTernary:
    """A packed matrix without data."""
    packed = torch.empty(rows, columns // 4, dtype=torch.uint8, device="meta")
    return PackedTernary(packed, torch.empty(rows, columns // group if group else 1, device="meta"), columns)


def activations(tokens: int, columns: int, group: int | None = None) -> QuantizedActivations:
    """Quantised tokens without data."""
    return QuantizedActivations(
        torch.empty(tokens, columns, dtype=torch.int8, device="meta"),
        torch.empty(tokens, 1, device="meta"),
        torch.empty(tokens, columns // group if group else 1, dtype=torch.int32, device="meta"),
    )


def cases() -> list[MetaCall]:
    """Every kernel in the forms that the operations launch, for the shapes and group sizes that decide the form."""
    listed = [*_quantizer_cases(), *_decode_cases(), *_product_cases(), *_stream_cases(), *_loss_cases()]
    return [*listed, *_gradient_cases(), *_nvfp4_cases(), *_edge_cases()]


def _decode_cases() -> list[MetaCall]:
    listed = []
    for rows, columns in ((4096, 4096), (11008, 4096), (4096, 11008), (768, 768)):
        for group in (None, 64, 128, 256):
            if group == 256 and columns % 256:
                continue
            for tokens in (1, 2, 4, 8, 16, 64):
                name = f"ternary_matmul {rows}x{columns} M={tokens}, {f'groups of {group}' if group else 'rows'}"
                essential = (rows, columns, tokens) == (4096, 4096, 1) and group in (None, 128)
                essential |= (rows, columns, tokens, group) == (4096, 4096, 16, 128)
                call = partial(
                    operations.ternary_matmul,
                    activations(tokens, columns, group),
                    weight(rows, columns, group),
                    torch.bfloat16,
                )
                listed.append(MetaCall(name, call, essential))
    return listed


def _product_cases() -> list[MetaCall]:
    listed = []
    for tokens, outputs, essential in ((512, 4096, False), (512, 8192, False), (8192, 4096, True)):
        for dtype, operation in ((torch.int8, operations.int8_matmul), (torch.float8_e4m3fn, operations.fp8_matmul)):
            operands = [torch.empty(rows, 4096, dtype=dtype, device="meta") for rows in (tokens, outputs)]
            scales = [torch.empty(rows, 1, device="meta") for rows in (tokens, outputs)]
            call = partial(operation, *operands, *scales, torch.bfloat16)
            # Compute capability 8.0 has no fp8.
            architectures = (80, 90, 100) if dtype == torch.int8 else (90, 100)
            listed.append(MetaCall(f"{operation.__name__} {tokens}x{outputs}x4096", call, essential, architectures))
    for group in (None, 128):
        call = partial(
            operations.ternary_matmul, activations(512, 4096, group), weight(4096, 4096, group), torch.bfloat16
        )
        listed.append(MetaCall(f"ternary_matmul 4096x4096 M=512, {'groups of 128' if group else 'rows'}", call))
        call = partial(ternary_small_matmul, activations(512, 4096, group), weight(4096, 4096, group), torch.bfloat16)
        listed.append(MetaCall(f"ternary_small_matmul 4096x4096 M=512, {'groups of 128' if group else 'rows'}", call))
    for dtype in (torch.int8, torch.bfloat16, torch.float32, torch.float8_e4m3fn):
        call = partial(operations.unpack, weight(4096, 4096), dtype)
        essential = dtype in (torch.int8, torch.bfloat16)
        listed.append(MetaCall(f"unpack to {str(dtype).removeprefix('torch.')}", call, essential))
    return listed


def _gradient_cases() -> list[MetaCall]:
    """Gradients in int8: of many outputs, and of few, whose programs share the tokens, with a weight to transpose."""
    listed = []
    for tokens, inputs, outputs, transposed in ((16384, 2048, 5632, True), (32768, 768, 768, False)):
        dy = torch.empty(tokens, outputs, dtype=torch.bfloat16, device="meta")
        codes, operand = (torch.empty(rows, inputs, dtype=torch.int8, device="meta") for rows in (tokens, outputs))
        scale, w_scale = (torch.empty(rows, device="meta") for rows in (tokens, outputs))
        operand = operand.T.contiguous().T if transposed else operand
        call = partial(operations.int8_gradients, [dy], codes, scale, [operand], [w_scale], torch.bfloat16)
        name = f"int8_gradients, {tokens} tokens, {inputs} to {outputs}"
        listed.append(MetaCall(name, call, not transposed, (80, 90, 100, 120)))
    return listed


def _stream_cases() -> list[MetaCall]:
    listed = []
    for n in (2, 4):
        for width in (768, 1536):
            x = torch.empty(64, n, width, device="meta")
            y = torch.empty(64, width, dtype=torch.bfloat16, device="meta")
            for form, rows, beside in (("read", 1, None), ("write", n, y)):
                weights = torch.empty(64, rows, n + (beside is not None), device="meta")
                grad = torch.empty(64, rows, width, device="meta")
                name, essential = f"{form} {n} streams of {width}", (width, n, form) == (1536, 4, "write")
                listed += [
                    MetaCall(name, partial(hyper_connections.forward, x, weights, beside), essential),
                    MetaCall(
                        f"{name}, backward", partial(hyper_connections.backward, grad, x, weights, beside), essential
                    ),
                ]
    return listed


def _loss_cases() -> list[MetaCall]:
    listed = []
    for rows, vocabulary in ((8192, 32768), (8192, 50257), (8192, 300), (1, 1)):
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.empty(rows, vocabulary, dtype=dtype, device="meta")
            targets, factor = (torch.empty(rows, dtype=kind, device="meta") for kind in (torch.int64, torch.float32))
            call = partial(operations.cross_entropy_gradient, logits, targets, factor)
            name = f"cross_entropy_gradient {rows}x{vocabulary}, {str(dtype).removeprefix('torch.')}"
            listed.append(MetaCall(name, call, vocabulary == 32768 and dtype == torch.bfloat16))
    return listed


def _nvfp4_cases() -> list[MetaCall]:
    """Of compute capability 10.0 (B200), 10.3 (B300) and 12.0 (RTX 50)."""
    listed = []
    for columns in (768, 4096):
        x = torch.empty(8192, columns, dtype=torch.bfloat16, device="meta")
        listed.append(
            MetaCall(f"nvfp4_quantize K={columns}", partial(operations.nvfp4_quantize, x), columns == 4096, BLACKWELL)
        )
    for tokens, outputs, columns, row_scales in (
        (8192, 4096, 4096, True),
        (100, 72, 400, True),
        (8192, 4096, 4096, False),
    ):
        packed = torch.empty(tokens, columns // 16 * 9, dtype=torch.uint8, device="meta")
        weights = torch.empty(outputs, columns // 2, dtype=torch.uint8, device="meta")
        scales = [torch.empty(rows, 1, device="meta") for rows in (tokens, outputs if row_scales else 1)]
        call = partial(operations.nvfp4_matmul, packed, scales[0], weights, scales[1], torch.bfloat16)
        name = f"nvfp4_matmul {tokens}x{outputs}x{columns}, {'row' if row_scales else 'tensor'} scales"
        listed.append(MetaCall(name, call, tokens == 8192 and row_scales, BLACKWELL))
    return listed


def _edge_cases() -> list[MetaCall]:
    """Sizes of one, which Triton turns into constants of the kernel."""
    listed = [
        MetaCall(
            "ternarize 1x128, tensor", partial(ternarize_forms, torch.empty(1, 128, device="meta"), "tensor"), True
        ),
        MetaCall(
            "quantize_activations 1x1", partial(operations.quantize_activations, torch.empty(1, 1, device="meta"))
        ),
    ]
    for tokens in (1, 8):
        for group in (None, 128):
            call = partial(operations.ternary_matmul, activations(tokens, 4096, group), weight(1, 4096, group))
            name = f"ternary_matmul 1x4096 M={tokens}, {f'groups of {group}' if group else 'rows'}"
            listed.append(MetaCall(name, call))
    one = partial(ternary_small_matmul, activations(1, 4096), weight(1, 4096))
    listed.append(MetaCall("ternary_small_matmul 1x4096 M=1, rows", one))
    return listed


def _quantizer_cases() -> list[MetaCall]:
    listed = []
    for granularity in ("row", "tensor", 128):
        latent = torch.empty(4096, 4096, device="meta")
        call = partial(ternarize_forms, latent, granularity, codes=True, packed=True)
        listed.append(MetaCall(f"ternarize 4096x4096, {granularity}", call, granularity == "row"))
    for dtype, held in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.int8, False)):
        latent, operand = torch.empty(768, 768, device="meta"), torch.empty(768, 768, dtype=dtype, device="meta")
        packed = torch.empty(768, 192, dtype=torch.uint8, device="meta") if held else None
        call = partial(ternarize_rows, [latent], [torch.empty(768, 1, device="meta")], [operand], [packed])
        name = f"ternarize_rows to {str(dtype).removeprefix('torch.')}{', packed' if held else ''}"
        listed.append(MetaCall(name, call, held))
    for columns in (768, 4096, 11008, 28672):
        for group in (None, 128):
            x, norm = (
                torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((16, columns), (columns,))
            )
            suffix = f"K={columns}, {f'sums of {group}' if group else 'one sum'}"
            essential = columns == 4096 and group is None
            listed += [
                MetaCall(
                    f"quantize_activations {suffix}", partial(operations.quantize_activations, x, group), essential
                ),
                MetaCall(
                    f"rmsnorm_quantize {suffix}",
                    partial(operations.rmsnorm_quantize, x, norm, 1e-6, group),
                ),
                MetaCall(f"swiglu_quantize {suffix}", partial(operations.swiglu_quantize, x, x, group)),
            ]
    return listed


def launches(case: MetaCall, architecture: int) -> list[Launch]:
    """The kernels that the case would launch on that architecture."""
    with record(architecture) as recording:
        case.call()
    return recording.calls


def compile_launch(case: str, call: Launch, architecture: int) -> Figures:
    """Compile one launch as Triton would at run time, and read the result."""
    compiled = triton.compile(
        _source(call),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": call.num_warps, "num_stages": call.num_stages},
    )
    cubin = compiled.asm["cubin"]
    text = sass.disassemble(cubin)
    instructions = sass.instructions(text)
    resources = sass.usage(cubin)
    counts = sass.opcodes(instructions)
    multiply_adds = {opcode: counts[opcode] for opcode in MAC_INSTRUCTIONS if counts[opcode]}
    loop = max((sass.inner_loop(text, opcode) for opcode in multiply_adds), key=len, default=[])
    per_weight = lane_instructions_per_weight(call, loop) if call.weights and loop else None
    return Figures(
        case=case,
        kernel=call.kernel.fn.__name__,
        architecture=architecture,
        constants={name: value for name, value in call.constants.items() if isinstance(value, int | str)},
        num_warps=call.num_warps,
        num_stages=call.num_stages,
        registers=resources.registers,
        stack=resources.stack,
        local_accesses=counts["LDL"] + counts["STL"],
        shared=compiled.metadata.shared,
        instructions=sum(counts.values()),
        global_accesses=dict(sass.global_accesses(instructions)),
        multiply_adds=multiply_adds,
        loop_instructions=len(loop) or None,
        float_operations=dict(Counter(_FLOAT_OPERATION.findall(compiled.asm["ptx"]))),
        loop_barriers=sass.opcodes(loop)["BAR"] if loop else None,
        lane_instructions_per_weight=per_weight,
    )


def lane_instructions_per_weight(call: Launch, loop: Sequence[str]) -> float:
    """Instructions issued per lane and weight. The compiler may have unrolled the loop: dp4a counts tell how often."""
    lanes = 32 * call.num_warps
    unrolled = 1.0
    if dp4a := sass.opcodes(loop)[sass.DP4A]:
        unrolled = dp4a * 4 * lanes / call.multiplies
    return round(len(loop) * lanes / (call.weights * unrolled), 3)


def _source(call: Launch) -> ASTSource:
    """The call's kernel, specialised as at run time: ones are constants, and multiples of 16 are declared as such."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = {**call.arguments, **call.constants}
    for index, name in enumerate(call.kernel.arg_names):
        value = values[name]
        if name in call.constants or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[(index,)] = value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(call.kernel, signature, constants, attributes)


def compile_all(
    architectures: Sequence[int], essential: bool, report: Callable[[Figures], None], prefix: str = ""
) -> list[Figures]:
    """Every distinct kernel of the cases whose names begin so, once per architecture."""
    figures: list[Figures] = []
    for architecture in architectures:
        seen: set[str] = set()
        for case in cases():
            if architecture not in case.architectures or (essential and not case.essential):
                continue
            if not case.name.startswith(prefix):
                continue
            for call in launches(case, architecture):
                source = _source(call)
                specialised = f"{source.signature} {source.constants} {source.attrs}"
                key = f"{call.kernel.fn.__name__} {specialised} {call.num_warps} {call.num_stages}"
                if key in seen:
                    continue
                seen.add(key)
                figures.append(compile_launch(case.name, call, architecture))
                report(figures[-1])
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every case, not only the essential ones")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--cases", default="", metavar="PREFIX", help="only those whose names begin so")
    options = parser.parse_args(arguments)
    compile_all(
        options.architectures,
        not options.all,
        lambda figures: print(json.dumps(dataclasses.asdict(figures)), flush=True),
        options.cases,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
