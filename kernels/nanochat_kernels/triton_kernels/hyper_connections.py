"""Mixing of residual streams in one kernel that reads every stream once, and its gradients in another.

A program handles one token, in tiles [rows, sources, BLOCK] of its values; the sources are the n streams and, when
writing, y. Everything is float32 except y, which may be half. The gradient of the weights is a sum over the values of a
token in a fixed order; one mixing for all tokens sums over these outside. No atomics: runs repeat exactly.
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# (the bodies of kernels are Triton's language, whose stubs do not type-check as Python)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from nanochat_kernels.backends import Unsupported
from nanochat_kernels.triton_kernels.launch import Launch, launch, require_device

STREAMS = (2, 4)
MAX_BLOCK = 256
"""With 512, ptxas spills in the backward pass of two streams on sm_100; 256 divides the widths of the presets."""


@triton.jit
def mix_kernel(
    x_ptr,  # float32 [M, N, C]
    y_ptr,  # [M, C]; unused without WITH_Y
    weights_ptr,  # float32 [ROWS, N + WITH_Y], tokens weights_stride apart
    out_ptr,  # float32 [M, ROWS, C]
    weights_stride,
    C,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, stream = tl.arange(0, ROWS), tl.arange(0, N)
    token_weights = weights_ptr + token * weights_stride + row * (N + WITH_Y)
    mixing = tl.load(token_weights[:, None] + stream[None, :])[:, :, None]
    if WITH_Y:
        writing = tl.load(token_weights + N)
    for start in range(0, C, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < C
        x = tl.load(x_ptr + (token * N + stream[:, None]) * C + k[None, :], mask=inside[None, :], other=0.0)
        total = tl.sum(mixing * x[None, :, :], axis=1)
        if WITH_Y:
            y = tl.load(y_ptr + token * C + k, mask=inside, other=0.0).to(tl.float32)
            total += writing[:, None] * y[None, :]
        tl.store(out_ptr + (token * ROWS + row[:, None]) * C + k[None, :], total, mask=inside[None, :])


@triton.jit
def mix_backward_kernel(
    x_ptr,
    y_ptr,
    weights_ptr,
    grad_ptr,  # float32 [M, ROWS, C], of the output
    x_grad_ptr,  # as x
    y_grad_ptr,  # as y
    weights_grad_ptr,  # float32 [M, ROWS, N + WITH_Y]
    weights_stride,
    C,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_Y: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row, stream = tl.arange(0, ROWS), tl.arange(0, N)
    token_weights = weights_ptr + token * weights_stride + row * (N + WITH_Y)
    mixing = tl.load(token_weights[:, None] + stream[None, :])[:, :, None]
    mixing_grad = tl.zeros((ROWS, N), dtype=tl.float32)
    writing_grad = tl.zeros((ROWS,), dtype=tl.float32)
    if WITH_Y:
        writing = tl.load(token_weights + N)
    for start in range(0, C, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < C
        of_x = (token * N + stream[:, None]) * C + k[None, :]
        x = tl.load(x_ptr + of_x, mask=inside[None, :], other=0.0)
        grad = tl.load(grad_ptr + (token * ROWS + row[:, None]) * C + k[None, :], mask=inside[None, :], other=0.0)
        tl.store(x_grad_ptr + of_x, tl.sum(mixing * grad[:, None, :], axis=0), mask=inside[None, :])
        mixing_grad += tl.sum(grad[:, None, :] * x[None, :, :], axis=2)
        if WITH_Y:
            y = tl.load(y_ptr + token * C + k, mask=inside, other=0.0).to(tl.float32)
            y_grad = tl.sum(writing[:, None] * grad, axis=0)
            tl.store(y_grad_ptr + token * C + k, y_grad.to(y_grad_ptr.dtype.element_ty), mask=inside)
            writing_grad += tl.sum(grad * y[None, :], axis=1)
    token_grads = weights_grad_ptr + (token * ROWS + row) * (N + WITH_Y)
    tl.store(token_grads[:, None] + stream[None, :], mixing_grad)
    if WITH_Y:
        tl.store(token_grads + N, writing_grad)


def mix_streams(x: Tensor, weights: Tensor, y: Tensor | None = None) -> Tensor:
    """`reference.hyper_connections.mix_streams`, with gradients.

    Raises Unsupported for other dtypes and numbers of streams, and off CUDA outside the interpreter.
    """
    require_device(x, weights, *(() if y is None else (y,)))
    n, rows = x.shape[-2], weights.shape[-2]
    if n not in STREAMS or rows not in (1, *STREAMS) or x.dtype != torch.float32 or weights.dtype != torch.float32:
        raise Unsupported(f"{rows} mixtures of {n} streams in {x.dtype} with weights of {weights.dtype}")
    return _Mix.apply(x, weights, y)  # pyright: ignore[reportReturnType]


def forward(x: Tensor, weights: Tensor, y: Tensor | None) -> Tensor:
    """x [M, n, C], weights [M or 1, rows, sources], y [M, C], all contiguous; [M, rows, C]."""
    tokens, n, width = x.shape
    rows = weights.shape[1]
    out = x.new_empty(tokens, rows, width)
    arguments = {"x_ptr": x, "y_ptr": x if y is None else y, "weights_ptr": weights, "out_ptr": out}
    _launch(mix_kernel, arguments, weights, tokens, width, n, with_y=y is not None)
    return out


def backward(grad: Tensor, x: Tensor, weights: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of x, of the weights per token [M, rows, sources], and of y."""
    tokens, n, width = x.shape
    x_grad = torch.empty_like(x)
    y_grad = None if y is None else torch.empty_like(y)
    weights_grad = weights.new_empty(tokens, *weights.shape[1:])
    arguments = {
        "x_ptr": x,
        "y_ptr": x if y is None else y,
        "weights_ptr": weights,
        "grad_ptr": grad,
        "x_grad_ptr": x_grad,
        "y_grad_ptr": x_grad if y_grad is None else y_grad,
        "weights_grad_ptr": weights_grad,
    }
    _launch(mix_backward_kernel, arguments, weights, tokens, width, n, with_y=y is not None)
    return x_grad, weights_grad, y_grad


def _launch(
    kernel: Any, arguments: dict[str, Tensor], weights: Tensor, tokens: int, width: int, n: int, *, with_y: bool
) -> None:
    numbers = {"weights_stride": weights.stride(0) if len(weights) > 1 else 0, "C": width}
    block = min(MAX_BLOCK, triton.next_power_of_2(width))
    constants = {"N": n, "ROWS": weights.shape[1], "WITH_Y": with_y, "BLOCK": block}
    launch(Launch(kernel, (tokens,), {**arguments, **numbers}, constants))


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, y: Tensor | None) -> Tensor:
        flat = x.flatten(0, -3).contiguous()
        flat_weights = (weights.flatten(0, -3) if weights.ndim > 2 else weights[None]).contiguous()
        flat_y = None if y is None else y.flatten(0, -2).contiguous()
        ctx.save_for_backward(flat, flat_weights, flat_y)
        ctx.shapes = x.shape, weights.shape, None if y is None else y.shape
        return forward(flat, flat_weights, flat_y).unflatten(0, x.shape[:-2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_shape, weights_shape, y_shape = ctx.shapes
        x_grad, weights_grad, y_grad = backward(grad.flatten(0, -3).contiguous(), *ctx.saved_tensors)
        shared = len(weights_shape) == 2
        weights_grad = weights_grad.sum(dim=0) if shared else weights_grad.view(weights_shape)
        return x_grad.view(x_shape), weights_grad, None if y_grad is None else y_grad.view(y_shape)
