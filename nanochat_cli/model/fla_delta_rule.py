"""The gated delta rule by flash-linear-attention, on CUDA.

Imported when it is first used: the decorator loads torch's compiler, which takes a second.
"""

import torch
from torch import Tensor


@torch.compiler.disable
def fla_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """q, k, v [B, H, T, D], log_decay and beta [B, H, T], as `chunked_delta_rule` takes them; float32 [B, T, H, D]."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # pyright: ignore[reportMissingImports]

    half = (t.transpose(1, 2).to(torch.bfloat16).contiguous() for t in (q, k, v))
    g, b = (t.mT.contiguous() for t in (log_decay, beta))
    return chunk_gated_delta_rule(*half, g=g, beta=b, scale=1.0)[0].transpose(1, 2).float()
