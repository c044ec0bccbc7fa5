"""The device and the number format of a run, and the errors where this machine lacks them."""

import torch

from nanochat_cli.config.sections.train import TrainConfig
from nanochat_cli.errors import ConfigError
from nanochat_kernels.four_bit import has_nvfp4


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one. Raises ConfigError for a device that this machine lacks."""
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.cuda.is_available():
        there.insert(1, "cuda")
    if name == "auto":
        name = "cuda" if "cuda" in there else "cpu"
    if name not in there:
        raise ConfigError(f"train.device = {name}: this machine has no such device; use auto or {' or '.join(there)}")
    return torch.device(name)


def choose_autocast(dtype: str, device: torch.device) -> torch.dtype | None:
    """None means float32 throughout: the default on a CPU, where bfloat16 is slow."""
    if dtype == "bf16" or (dtype == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def codes_dtype(autocast: torch.dtype | None, device: torch.device) -> torch.dtype:
    """In which training holds codes that no integer product reads: all of them are exact in any dtype.

    A GPU multiplies them in the autocast dtype: so held, no step has to cast them.
    """
    return autocast or torch.float32 if device.type == "cuda" else torch.float32


def require_float8(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError where train.grad_input = fp8 has no tensor cores to run on, or contradicts train.backward."""
    if train.grad_input == "exact":
        return
    if train.backward in ("bf16", "int8"):
        raise ConfigError(
            f"train.grad_input = fp8 and train.backward = {train.backward} are two formats of one gradient: use one"
        )
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(
            f"train.grad_input = fp8 needs a GPU of compute capability 8.9 or later, and this is {device}: use exact"
        )


def require_nvfp4(train: TrainConfig, device: torch.device) -> None:
    """Raise ConfigError where train.forward = nvfp4 has no tensor cores to run on."""
    if train.forward == "nvfp4" and not has_nvfp4(device):
        raise ConfigError(
            f"train.forward = nvfp4 needs a GPU of compute capability 10 or 12 (Blackwell), and this is {device}: "
            "use auto, or nvfp4-emulated to study its rounding"
        )
