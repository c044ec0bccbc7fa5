"""Cross-entropy of rows of logits, which become their gradient: read twice and written once, in their own dtype.

A program handles one row. First maximum and sum of exponentials in one pass (arXiv:1805.02867), then the gradient in a
second, whose reads the cache should still have. The idea of the loss in place of its logits is Liger's
(arXiv:2410.10989). Everything between load and store is float32.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device

MAX_BLOCK = 8192
"""With 16 warps, 16 logits per thread: two reads of 16 bytes of bf16 under way at once."""
LOGITS_PER_WARP = 512


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # [M, V], rows logits_stride apart; overwritten
    targets_ptr,  # int64 [M]
    factor_ptr,  # float32 [M], factor_stride apart
    loss_ptr,  # float32 [M]
    logits_stride,
    factor_stride,
    V,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * logits_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    valid = target >= 0
    # Before anything is overwritten. A kernel cannot raise: a target outside of the vocabulary has a loss of NaN.
    picked = tl.load(logits + target, mask=valid & (target < V), other=float("nan")).to(tl.float32)
    block = tl.arange(0, BLOCK)
    # Finite, so that logits of -inf before the first finite one do not make exp(-inf + inf).
    maximum = tl.full((), -3.0e38, tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        k = start + block
        x = tl.load(logits + k, mask=k < V, other=-float("inf"), eviction_policy="evict_last").to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, axis=0))
        sums = sums * tl.exp(maximum - larger) + tl.exp(x - larger)
        maximum = larger
    total = tl.sum(sums, axis=0)
    tl.store(loss_ptr + row, tl.where(valid, tl.log(total) + (maximum - picked), 0.0))
    factor = tl.load(factor_ptr + row * factor_stride)
    inverse = 1.0 / total
    for start in range(0, V, BLOCK):
        k = start + block
        x = tl.load(logits + k, mask=k < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
        softmax = tl.exp(x - maximum) * inverse
        gradient = tl.where(valid, (softmax - tl.where(k == target, 1.0, 0.0)) * factor, 0.0)
        tl.store(logits + k, gradient.to(logits_ptr.dtype.element_ty), mask=k < V)


def cross_entropy_gradient(logits: Tensor, targets: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.cross_entropy.cross_entropy_gradient`; a target outside of the vocabulary has a loss of NaN.

    Raises Unsupported for other dtypes, for logits of a row that are not neighbours, and off CUDA outside the
    interpreter.
    """
    require_device(logits, targets, factor)
    dtypes = logits.dtype, targets.dtype, factor.dtype
    if dtypes[0] not in (torch.float32, torch.bfloat16) or dtypes[1:] != (torch.int64, torch.float32):
        raise Unsupported(f"logits of {dtypes[0]} with targets of {dtypes[1]} and factors of {dtypes[2]}")
    rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        raise Unsupported("logits of a row that are not next to each other")
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    arguments = {
        "logits_ptr": logits,
        "targets_ptr": targets.contiguous(),
        "factor_ptr": factor,
        "loss_ptr": loss,
        "logits_stride": logits.stride(0),
        "factor_stride": factor.stride(0),
        "V": vocabulary,
    }
    block = min(MAX_BLOCK, triton.next_power_of_2(vocabulary))
    warps = max(block // LOGITS_PER_WARP, 1)
    launch(Launch(cross_entropy_kernel, (rows,), arguments, {"BLOCK": block}, num_warps=warps))
    return loss, logits
