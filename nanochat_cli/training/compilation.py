"""When and how the model is compiled with `torch.compile`.

Every block is compiled on its own: the blocks share one compiled function, so that compile time does not grow
with depth. On a CPU inductor needs a C++ compiler; without one the model runs eagerly, and the run says why.
"""

import os
import shutil
from dataclasses import dataclass

import torch

from nanochat_cli.model.transformer import Transformer

# What compiling saves of a step is measured in benchmarks/results/qat_overhead.json; it costs tens of seconds on two
# cores, so that a run of less than two minutes would lose by it.
MIN_SECONDS_WORTH_COMPILING = 120.0


@dataclass(frozen=True)
class Decision:
    """Whether to compile, and the reason in words."""

    compile: bool
    reason: str


def find_compiler() -> str | None:
    """The C++ compiler that inductor would use on this machine."""
    candidates = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def decide(setting: str, device: torch.device, expected_seconds: float | None) -> Decision:
    """setting: train.compile (auto | on | off); expected_seconds: of the whole run, eagerly, if known."""
    if setting == "off":
        return Decision(False, "train.compile = off")
    if device.type == "cpu" and find_compiler() is None:
        return Decision(False, "no C++ compiler on this machine (g++ or clang++ would make training faster)")
    if setting == "on":
        return Decision(True, "train.compile = on")
    if expected_seconds is not None and expected_seconds < MIN_SECONDS_WORTH_COMPILING:
        return Decision(False, f"the run takes about {expected_seconds:.0f} s, compiling would not pay")
    return Decision(True, "the run is long enough to pay for it")


def compile_blocks(model: Transformer) -> None:
    """Compile each block in place, for static shapes."""
    for block in model.blocks:
        block.compile(dynamic=False)
