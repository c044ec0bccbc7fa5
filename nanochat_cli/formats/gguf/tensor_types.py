"""Which ggml type each tensor gets, and where each type runs.

Chooses by shapes and scale granularity alone, never by values, so that a model always exports to the
same types. Does no packing.

`auto` takes TQ2_0 (the fastest on CPUs) if it holds the matrix exactly, else Q2_0 (the smallest that
does), else Q4_0, else F16, which holds code × f16 scale exactly too.
"""

from dataclasses import dataclass

from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.gguf.packing import TERNARY_TYPES
from nanochat_kernels import Granularity

AUTO_ORDER = ("tq2_0", "q2_0", "q4_0", "f16")
FLOAT_TYPES = ("f16", "f32")


@dataclass(frozen=True)
class Support:
    """Kernels that llama.cpp (build b11549) has for a type; read from its sources."""

    bits_per_weight: float
    x86_cpu: str
    arm_cpu: str
    cuda: str
    metal: str
    vulkan: str


SUPPORT = {
    "tq2_0": Support(2.0625, "AVX2, fastest", "yes", "no: falls back to the CPU", "yes", "yes"),
    "tq1_0": Support(1.6875, "AVX2", "yes", "no: falls back to the CPU", "no", "yes"),
    "q2_0": Support(2.25, "scalar: slow", "yes", "yes", "yes", "yes"),
    "q4_0": Support(4.5, "yes", "yes", "yes", "yes", "yes"),
    "f16": Support(16, "yes", "yes", "yes", "yes", "yes"),
    "f32": Support(32, "yes", "yes", "yes", "yes", "yes"),
}


def fits(type_name: str, n_columns: int, granularity: Granularity) -> bool:
    """Whether a matrix with rows of `n_columns` and one scale per `granularity` is exact in this type."""
    if type_name in FLOAT_TYPES:
        return True
    block = TERNARY_TYPES[type_name].block
    return n_columns % block == 0 and (isinstance(granularity, str) or granularity % block == 0)


def choose_type(requested: str, what: str, n_columns: int, granularity: Granularity | None) -> str:
    """The type of one matrix; `granularity` is None for a float matrix.

    Raises ConfigError if `requested` cannot hold it exactly, naming the types that can.
    """
    if granularity is None:
        if requested == "auto":
            return "f16"
        if requested not in FLOAT_TYPES:
            raise ConfigError(
                f"export.type = {requested} needs a ternary model, and this one was trained with "
                "quant.enabled = false: use f16 or f32"
            )
        return requested
    if requested == "auto":
        return next(name for name in AUTO_ORDER if fits(name, n_columns, granularity))
    if not fits(requested, n_columns, granularity):
        block = TERNARY_TYPES[requested].block
        scale = f"one scale per {granularity}" if isinstance(granularity, int) else f"scale = {granularity}"
        would = ", ".join(name for name in AUTO_ORDER if fits(name, n_columns, granularity))
        raise ConfigError(
            f"{what} ({n_columns} columns, {scale}) does not fit {requested}, whose blocks are {block} weights "
            f"with one scale: use export.type = auto, or one of {would}"
        )
    return requested


def support_table(type_names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of where the given types run."""
    columns = ["type", "bits/weight", "x86 CPU", "ARM CPU", "CUDA", "Metal", "Vulkan"]
    rows = [
        [name, f"{s.bits_per_weight:g}", s.x86_cpu, s.arm_cpu, s.cuda, s.metal, s.vulkan]
        for name, s in SUPPORT.items()
        if name in type_names
    ]
    return columns, rows
