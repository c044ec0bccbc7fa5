"""Mixing of residual streams: one kernel on CUDA, the formula elsewhere. Both have gradients.

torch.compile gets the formula: it fuses it with the operations around it, which a kernel of ours would prevent.
"""

import torch
from torch import Tensor

from nanochat_kernels.backends import Unsupported, candidates, report_fallback
from nanochat_kernels.reference import hyper_connections as reference

__all__ = ["mix_streams"]


def mix_streams(x: Tensor, weights: Tensor, y: Tensor | None = None) -> Tensor:
    """`reference.hyper_connections.mix_streams`, fused if possible."""
    if x.is_cuda and not torch.compiler.is_compiling() and candidates(x.device)[0] == "triton":
        try:
            from nanochat_kernels.triton_kernels import hyper_connections

            return hyper_connections.mix_streams(x, weights, y)
        except (ImportError, Unsupported) as reason:
            report_fallback("mix_streams", "triton", str(reason))
    return reference.mix_streams(x, weights, y)
