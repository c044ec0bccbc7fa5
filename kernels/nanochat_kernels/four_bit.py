"""Activations of a training layer in NVFP4, for tensor cores that have it or, rounded alike, for any product.

`nvfp4` keeps the bytes of tokens (9 / 16 byte per input) and multiplies them as they are; the backward pass reads their
values. `nvfp4-emulated` keeps the values, which the dtype of the product holds exactly: slow, and for studies. The two
differ only in the order and the precision in which the hardware adds.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from nanochat_kernels import operations
from nanochat_kernels.reference import nvfp4 as reference
from nanochat_kernels.reference.nvfp4 import BLOCK, MAJORS, nvfp4_values

FourBit = Literal["nvfp4", "nvfp4-emulated"]
FOUR_BIT: tuple[FourBit, ...] = get_args(FourBit)


def has_nvfp4(device: torch.device) -> bool:
    """Whether `nvfp4` runs there as what it is."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in MAJORS


def four_bit_codes(x: Tensor, form: FourBit, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens x [..., K]: bytes [..., 9 K / 16] or, emulated, values [..., K] in dtype; and their scale [..., 1]."""
    return _bytes_of(x) if form == "nvfp4" else _emulated(x, dtype)


@torch.library.custom_op("nanochat::nvfp4_quantize", mutates_args=())
def _bytes_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """`operations.nvfp4_quantize` as one node of a compiled graph."""
    packed, scale = operations.nvfp4_quantize(x)
    return packed, scale


@_bytes_of.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    packed = x.new_empty(*x.shape[:-1], x.shape[-1] // BLOCK * 9, dtype=torch.uint8)
    return packed, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("nanochat::nvfp4_emulated", mutates_args=())
def _emulated(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    packed, scale = reference.nvfp4_quantize(x)
    return nvfp4_values(packed).to(dtype), scale


@_emulated.register_fake
def _(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.custom_op("nanochat::nvfp4_product", mutates_args=())
def four_bit_product(packed: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`operations.nvfp4_matmul` as one node: bytes of tokens [..., 9 K / 16] and weights [N, K / 2] to [..., N]."""
    rows, w_scale = packed.flatten(0, -2), w_scale.unsqueeze(1)
    y = operations.nvfp4_matmul(rows, scale.reshape(-1, 1), weight, w_scale, dtype)
    return y.view(*packed.shape[:-1], len(weight))


@four_bit_product.register_fake
def _(packed: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*packed.shape[:-1], weight.shape[0], dtype=dtype)
