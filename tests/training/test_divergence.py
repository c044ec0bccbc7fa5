"""The chunked distance from a teacher against torch's kl_div on whole logits in float64."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_cli.training.divergence import chunked_divergence
from nanochat_cli.training.losses import IGNORE

N, C, D, V = 150, 24, 40, 130


def problem(seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Student's hidden states and head, the teacher's, and targets of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, C), (V, C), (N, D), (V, D)
    hidden, head, told, teacher_head = (0.5 * torch.randn(shape, generator=generator) for shape in shapes)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::7] = IGNORE
    return hidden.requires_grad_(), head.requires_grad_(), told, teacher_head, targets


def dense(hidden, head, told, teacher_head, targets, temperature: float, top_k: int) -> torch.Tensor:
    """Whole logits in float64; what is not among the teacher's k largest is -∞."""
    logits, teacher = hidden.double() @ head.double().T / temperature, told.double() @ teacher_head.double().T
    if top_k:
        smallest = teacher.sort(dim=-1, descending=True).values[:, top_k - 1 : top_k]
        teacher = teacher.masked_fill(teacher < smallest, -torch.inf)
    p = (teacher / temperature).softmax(dim=-1)
    each = F.kl_div(logits.log_softmax(dim=-1), p, reduction="none").sum(dim=-1)
    return each[targets != IGNORE].mean()


@pytest.mark.parametrize("chunk", [1, 64, 149, 150, 1000])
@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (2.5, 0), (1.0, 1), (0.7, 20), (1.0, V), (1.0, 10 * V)])
def test_value_and_gradients_are_those_of_torch(chunk, temperature, top_k):
    hidden, head, told, teacher_head, targets = problem()
    expected = dense(hidden, head, told, teacher_head, targets, temperature, min(top_k, V))
    found = chunked_divergence(
        hidden, head, told, teacher_head, targets, temperature=temperature, top_k=top_k, chunk=chunk
    )
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(3 * value, (hidden, head)) for value in (found, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_equal_models_are_at_distance_zero_with_gradient_zero():
    hidden, head, *_, targets = problem()
    found = chunked_divergence(hidden, head, hidden.detach(), head.detach(), targets, chunk=64)
    assert found == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(found, (hidden, head)))


def test_without_a_target_that_counts_it_is_zero():
    hidden, head, told, teacher_head, targets = problem()
    found = chunked_divergence(hidden, head, told, teacher_head, torch.full_like(targets, IGNORE))
    assert found == 0
    assert all(not gradient.any() for gradient in torch.autograd.grad(found, (hidden, head)))


class Largest(TorchDispatchMode):
    """The most rows of any tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, tensor.shape[0])
        return out


def test_logits_exist_for_one_chunk_at_a_time():
    hidden, head, told, teacher_head, targets = problem()
    with Largest() as largest:
        chunked_divergence(hidden, head, told, teacher_head, targets, chunk=16).backward()
    assert 0 < largest.rows <= max(16, C, D)  # a transposed head has C or D rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hidden_states_in_half_precision_have_gradients_of_their_dtype(dtype):
    hidden, head, told, teacher_head, targets = problem()
    half = hidden.detach().to(dtype).requires_grad_()
    found = chunked_divergence(half, head, told.to(dtype), teacher_head, targets, chunk=64)
    expected = dense(hidden, head, told, teacher_head, targets, 1.0, 0)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=0.03, atol=0.01)
    of_hidden, of_head = torch.autograd.grad(found, (half, head))
    assert (of_hidden.dtype, of_head.dtype) == (dtype, torch.float32)
