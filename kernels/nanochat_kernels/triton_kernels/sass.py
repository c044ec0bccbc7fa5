"""Facts about a kernel from NVIDIA machine code: resources, tensor-core or dp4a instructions, the inner loop.

Knows the text that cuobjdump and nvdisasm print, both of which come with triton; knows nothing of Triton kernels.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TENSOR_CORE = ("IMMA", "IGMMA", "UTCIMMA", "QGMMA", "UTCQMMA", "HMMA", "HGMMA", "UTCHMMA", "OMMA", "UTCOMMA")
DP4A = "IDP"

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<text>[^;]+);")
_LABEL = re.compile(r"^\s*(?P<label>\.L_[\w.]+):")
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_]*)")
_ACCESS = re.compile(r"\b(?P<opcode>LDG|STG)(?:\.(?:(?P<size>128|64|[US]?16|[US]8)\b|[A-Z]\w*))*")
_BRANCH = re.compile(r"\bBRA\b.*`\((?P<label>\.L_[\w.]+)\)")
_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Usage:
    """registers per thread; stack: bytes per thread, not 0 if registers spill; local: bytes per thread."""

    registers: int
    stack: int
    local: int


def usage(cubin: bytes) -> Usage:
    """Resources of the one kernel in a binary."""
    match = _USAGE.search(_run("cuobjdump", ("-res-usage",), cubin))
    if match is None:
        raise ValueError("cuobjdump did not print the resources of the kernel")
    return Usage(int(match["registers"]), int(match["stack"]), int(match["local"]))


def disassemble(cubin: bytes) -> str:
    """SASS with labels."""
    return _run("nvdisasm", ("-c",), cubin)


def opcodes(instructions: Sequence[str]) -> Counter[str]:
    """The count of each opcode, without modifiers: IMMA.16832.S8.S8 counts as IMMA."""
    return Counter(match["opcode"] for text in instructions if (match := _OPCODE.match(text)))


def instructions(sass: str) -> list[str]:
    """Every instruction of a disassembly, in order."""
    return [match["text"].strip() for line in sass.splitlines() if (match := _INSTRUCTION.search(line))]


def global_accesses(instructions: Sequence[str]) -> Counter[str]:
    """How often memory is loaded (LDG) and stored (STG), by bits of a lane: LDG.E.128.CONSTANT counts as LDG.128."""
    found = (_ACCESS.search(text) for text in instructions)
    return Counter(f"{m['opcode']}.{m['size'] or 32}".replace("U", "").replace("S8", "8") for m in found if m)


def inner_loop(sass: str, opcode: str) -> list[str]:
    """The instructions of the innermost loop with the most `opcode`s, NOPs left out; empty if no loop has any.

    A loop is what lies between a label and a branch back to it. Of nested loops the shortest counts; of loops that
    follow each other (the compiler unrolls, and adds a loop for the remainder) the one that does most of the work.
    """
    text: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if match := _LABEL.match(line):
            labels[match["label"]] = len(text)
        if match := _INSTRUCTION.search(line):
            text.append(match["text"].strip())
            branch = _BRANCH.search(text[-1])
            if branch and branch["label"] in labels:
                loops.append((labels[branch["label"]], len(text)))
    bodies = [text[start:end] for start, end in loops if not _contains_another(start, end, loops, text, opcode)]
    bodies = [[instruction for instruction in body if not instruction.startswith("NOP")] for body in bodies]
    best = max(bodies, key=lambda body: opcodes(body)[opcode], default=[])
    return best if opcodes(best)[opcode] else []


def _contains_another(start: int, end: int, loops: Sequence[tuple[int, int]], text: Sequence[str], opcode: str) -> bool:
    """Whether a smaller loop with `opcode` is inside this one."""
    return any(
        start <= inner_start and inner_end <= end and (inner_start, inner_end) != (start, end)
        for inner_start, inner_end in loops
        if opcodes(text[inner_start:inner_end])[opcode]
    )


def _run(tool: str, options: Sequence[str], cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
