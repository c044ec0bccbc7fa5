"""Launching a kernel: on the GPU, in the interpreter, or not at all but recorded for ahead-of-time compilation.

Every launcher of this package goes through `launch`. While `record` is active, tensors may be on the meta device and
nothing runs: the calls are kept, with every argument, so that what is compiled ahead of time is what would be launched.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.triton_kernels.language import INTERPRETED

MIN_CAPABILITY = 80
INTERPRETER_ARCHITECTURE = 90


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    grid: programs per axis. arguments: tensors and numbers by parameter name; constants: its constexprs.
    weights: weights that a program handles in one iteration of its inner loop, 0 if that has no meaning.
    multiplies: dp4a or tensor-core multiply-adds of those weights, that is weights times tokens of the tile.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    weights: int = 0
    multiplies: int = 0


@dataclass
class Recording:
    """Calls made while recording, for a GPU of this compute capability (80, 90, 100)."""

    architecture: int
    calls: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def record(architecture: int) -> Iterator[Recording]:
    """Collect launches instead of making them."""
    recording = Recording(architecture)
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def launch(call: Launch) -> None:
    """Run the kernel on the stream of its tensors' device; a grid without programs launches nothing."""
    if (recording := _recording.get()) is not None:
        recording.calls.append(call)
        return
    if 0 in call.grid:
        return
    device = next(value.device for value in call.arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        call.kernel[call.grid](**call.arguments, **call.constants, num_warps=call.num_warps, num_stages=call.num_stages)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels: a few calls of it took as long as the rest of a launcher."""
    return -(-a // b)


def inline_assembly() -> bool:
    """Whether kernels may use PTX: not in the interpreter."""
    return _recording.get() is not None or not INTERPRETED


def require_device(*tensors: Tensor) -> int:
    """The compute capability (90 for 9.0) that runs a kernel on these tensors. Raises Unsupported, with the reason."""
    if (recording := _recording.get()) is not None:
        return recording.architecture
    if INTERPRETED:
        return INTERPRETER_ARCHITECTURE
    device = tensors[0].device
    if device.type != "cuda":
        raise Unsupported(f"tensors on {device.type}; Triton needs CUDA, or TRITON_INTERPRET=1 at start")
    if any(tensor.device != device for tensor in tensors):
        raise Unsupported(f"tensors on several devices: {', '.join(str(tensor.device) for tensor in tensors)}")
    capability = _capability(device.index if device.index is not None else torch.cuda.current_device())
    if capability < MIN_CAPABILITY:
        raise Unsupported(f"compute capability {capability / 10}; the kernels need {MIN_CAPABILITY / 10}")
    return capability


@cache
def _capability(index: int) -> int:
    if torch.version.hip is not None:
        raise Unsupported("an AMD GPU; the kernels use PTX")
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
