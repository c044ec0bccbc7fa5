"""When and how the model is compiled with `torch.compile`.

Every block is compiled on its own: the blocks share one compiled function, so that compile time does not grow
with depth. On a CPU inductor needs a C++ compiler; without one the model runs eagerly, and the run says why.
"""

from dataclasses import dataclass

import torch

from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.cpp_compiler import find_compiler

# benchmarks/results/qat_overhead.json has what compiling saves per step. It costs tens of seconds on two cores, so a
# run of less than two minutes would lose by it.
MIN_SECONDS_WORTH_COMPILING = 120.0


@dataclass(frozen=True)
class Decision:
    """Whether to compile, and the reason in words."""

    compile: bool
    reason: str


def decide(setting: str, device: torch.device, expected_seconds: float | None) -> Decision:
    """setting: train.compile (auto | on | off); expected_seconds: of the whole run, eagerly, if known."""
    if setting == "off":
        return Decision(False, "train.compile = off")
    if setting == "auto" and expected_seconds is not None and expected_seconds < MIN_SECONDS_WORTH_COMPILING:
        return Decision(False, f"the run takes about {expected_seconds:.0f} s, compiling would not pay")
    if device.type == "cpu" and (obstacle := find_compiler().obstacle):
        return Decision(False, f"{obstacle} (compiled, training would be faster)")
    return Decision(True, "train.compile = on" if setting == "on" else "the run is long enough to pay for it")


def compile_blocks(model: Transformer) -> None:
    """Compile each block in place, for static shapes; nothing is compiled before the first step."""
    if model.device.type == "cpu" and (compiler := find_compiler().path):
        from torch._inductor import config  # only here: inductor takes a second to import

        config.cpp.cxx = (None, compiler)  # its own choice is $CXX or g++, whether that works or not
    for block in model.blocks:
        block.compile(dynamic=False)


def why_not_compiled(error: RuntimeError, device: torch.device) -> str | None:
    """The reason, in a line, when `error` comes from compiling; None for any other error."""
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return None
    if device.type == "cpu" and (obstacle := find_compiler().obstacle):
        return obstacle
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), next(iter(lines), type(cause).__name__))


def run_eagerly(model: Transformer) -> None:
    """Undo `compile_blocks`."""
    for block in model.blocks:
        block._compiled_call_impl = None  # torch has no public way back
