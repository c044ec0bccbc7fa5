"""How far a model's predictions are from a teacher's, without ever holding all logits of either.

    KL(p ‖ q) = Σ p · (log p − log q),  p = softmax(teacher's logits / T), q = softmax(student's logits / T)

`token_divergences` is one chunk of tokens, with the gradient by hand: (q − p) / T. With top_k, p is that of the
teacher's most probable tokens alone, renormalised, and q still of the whole vocabulary: what is told of the teacher
shrinks to k numbers a token, and the smallest divergence is then not 0 for equal models.
"""

import torch
from torch import Tensor

from nanochat_cli.training.losses import IGNORE


def token_divergences(student: Tensor, teacher: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor]:
    """KL of each token in nats, float32 [N], and its gradient by the student's logits, float32 [N, V].

    student, teacher: logits [N, V]. top_k: 0 for all tokens.
    """
    log_q = (student.float() / temperature).log_softmax(dim=-1)
    log_p = teacher.float() / temperature
    if 0 < top_k < log_p.shape[-1]:
        chosen, places = log_p.topk(top_k, dim=-1)
        log_p = chosen.log_softmax(dim=-1)
        p = log_p.exp()
        divergences = (p * (log_p - log_q.gather(1, places))).sum(dim=-1)
        gradient = log_q.exp_().scatter_add_(1, places, -p)
    else:
        log_p = log_p.log_softmax(dim=-1)
        p = log_p.exp()
        divergences = (p * (log_p - log_q)).sum(dim=-1)
        gradient = log_q.exp_().sub_(p)
    return divergences, gradient.div_(temperature)


def chunked_divergence(
    hidden: Tensor,
    unembedding: Tensor,
    teacher_hidden: Tensor,
    teacher_unembedding: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    chunk: int = 512,
) -> Tensor:
    """Mean KL(teacher ‖ student) in nats over tokens whose target is not -100, 0-dim float32.

    hidden: [N, C] and unembedding: [V, C], which have gradients; teacher_hidden: [N, D] and teacher_unembedding:
    [V, D], which have none; targets: int64 [N]. Logits exist for `chunk` tokens at a time.
    """
    arguments = (hidden, unembedding, teacher_hidden, teacher_unembedding, targets, temperature, top_k, chunk)
    return _ChunkedDivergence.apply(*arguments)  # pyright: ignore[reportReturnType] - apply is untyped in torch


class _ChunkedDivergence(torch.autograd.Function):
    """The gradients are computed with the value, as in `losses.chunked_cross_entropy`."""

    @staticmethod
    def forward(ctx, hidden, unembedding, teacher_hidden, teacher_unembedding, targets, temperature, top_k, chunk):
        weight, teacher_weight = unembedding.to(hidden.dtype), teacher_unembedding.to(teacher_hidden.dtype)
        valid = targets != IGNORE
        factor = valid / valid.sum().clamp(min=1)
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            piece = slice(start, min(start + chunk, len(hidden)))
            logits, told = hidden[piece] @ weight.T, teacher_hidden[piece] @ teacher_weight.T
            divergences, gradient = token_divergences(logits, told, temperature, top_k)
            total += (divergences * factor[piece]).sum()
            gradient = gradient.mul_(factor[piece].unsqueeze(1)).to(hidden.dtype)
            torch.mm(gradient, weight, out=grad_hidden[piece])
            grad_weight += gradient.T @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.unembedding_dtype = unembedding.dtype
        return total

    @staticmethod
    def backward(ctx, *grad_outputs):
        scale = grad_outputs[0]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * scale.to(grad_hidden.dtype),
            (grad_weight * scale).to(ctx.unembedding_dtype),
            *(None,) * 6,
        )
