"""Attention by blocks: as near to float64 as torch's, the same bits on any number of threads, nothing for what is left
out."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nanochat_cli.training.cpp_compiler import find_compiler
from nanochat_kernels import causal_attention
from nanochat_kernels.cpu import native
from nanochat_kernels.operations import attention, attention_backward

SHAPES = [  # B, H, Hkv, T, D
    *[(1, 1, 1, 1, 16), (2, 2, 1, 7, 48), (1, 4, 2, 16, 32), (2, 3, 3, 65, 64), (1, 4, 1, 100, 80)],
    *[(2, 2, 2, 128, 96), (1, 6, 2, 257, 64), (1, 2, 1, 300, 128), (1, 1, 1, 1000, 32)],
]
CPU = torch.device("cpu")


def inputs(b: int, heads: int, kv_heads: int, t: int, d: int, seed: int = 0) -> list[Tensor]:
    """q, k, v and the gradient of the output, in the layout that projections leave behind: [B, T, H, D]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = heads, kv_heads, kv_heads, heads
    return [torch.randn(b, t, h, d, generator=generator).mul_(1.5).transpose(1, 2) for h in sizes]


def torchs(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """y, dq, dk and dv of scaled_dot_product_attention."""
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = scaled_dot_product_attention(q, k, v, is_causal=True)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def ours(q: Tensor, k: Tensor, v: Tensor, dy: Tensor) -> list[Tensor]:
    q, k, v = leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = causal_attention(q, k, v)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("kernel_set")
def test_it_is_as_near_to_float64_as_torch_is(shape):
    q, k, v, dy = inputs(*shape, seed=sum(shape))
    exact, peer = (torchs(q, k, v, dy, dtype) for dtype in (torch.float64, torch.float32))
    for found, other, wanted in zip(ours(q, k, v, dy), peer, exact, strict=True):
        assert (found - wanted).norm() <= 2 * (other - wanted).norm() + 1e-7 * wanted.norm()
        assert (found - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("shape", SHAPES[:6])
def test_the_reference_is_attention_and_its_gradient(shape):
    q, k, v, dy = (x.double() for x in inputs(*shape))
    y, lse = attention(q, k, v, backend="reference")
    found = y, *attention_backward(dy, q, k, v, lse, backend="reference")
    for value, wanted in zip(found, torchs(q, k, v, dy, torch.float64), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("kernel_set")
def test_any_layout_gives_the_same_bits():
    q, k, v, dy = inputs(2, 4, 2, 70, 32)
    joint = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    parts = [x.unflatten(2, (-1, 32)).transpose(1, 2) for x in joint.split([128, 64, 64], dim=-1)]
    wanted = ours(q, k, v, dy)
    for a, b, c in (parts, [x.contiguous() for x in (q, k, v)]):
        assert all(torch.equal(*pair) for pair in zip(ours(a, b, c, dy), wanted, strict=True))
    one = dy[:1, :1, :1, :1].expand(dy.shape)
    both = ours(q, k, v, one), ours(q, k, v, one.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
@pytest.mark.usefixtures("kernel_set")
def test_queries_without_a_gradient_take_no_part(share):
    """The gradient is that of the float64 definition, and bits do not depend on what such a query holds."""
    q, k, v, dy = inputs(2, 4, 2, 150, 32)
    kept = torch.rand(2, 1, 150, 1, generator=torch.Generator().manual_seed(1)) < share
    dy = torch.where(kept, dy, 0)
    found = ours(q, k, v, dy)
    for value, wanted in zip(found, torchs(q, k, v, dy, torch.float64), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5)
    changed = ours(torch.where(kept, q, 3.0), k, v, dy)
    assert all(torch.equal(a, b) for a, b in zip(changed[1:], found[1:], strict=True))


@pytest.mark.usefixtures("kernel_set")
def test_what_is_not_finite_is_not_hidden():
    for value, which in itertools.product((torch.nan, torch.inf), range(4)):
        tensors = inputs(1, 1, 1, 40, 32)
        tensors[which][0, 0, 5, 3] = value
        y, *gradients = ours(*tensors)
        if which < 2:  # a value that is not finite may reach its neighbours: zero times it
            assert y[0, 0, :5].isfinite().all()
        if which < 3:
            assert not y[0, 0, 5:].isfinite().all()
        assert not all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.usefixtures("kernel_set")
def test_large_scores_are_weighed_without_overflow():
    q, k, v, dy = inputs(1, 2, 2, 50, 32)
    for size in (3, 30):  # of scores up to some thousands, whose rounding is no longer small
        exact, peer = (torchs(q * size, k * size, v, dy, dtype) for dtype in (torch.float64, torch.float32))
        for found, other, wanted in zip(ours(q * size, k * size, v, dy), peer, exact, strict=True):
            assert (found - wanted).norm() <= 4 * (other - wanted).norm() + 1e-7 * wanted.norm()


def test_threads_do_not_change_the_bits():
    tensors = inputs(2, 4, 2, 200, 64)
    wanted = ours(*tensors)
    library, threads = native.library(), native.library().nk_threads()
    try:
        for n in (1, 2, 3):
            library.nk_set_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(ours(*tensors), wanted, strict=True))
    finally:
        library.nk_set_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler().path is None, reason="no C++ compiler")
def test_it_is_one_node_of_a_compiled_graph():
    q, k, v, dy = inputs(2, 4, 2, 64, 32)

    def layer(q, k, v):
        return causal_attention(q * 2, k, v).transpose(1, 2).reshape(2, 64, -1) * 3

    both = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        y = function(*leaves)
        both.append([y.detach(), *torch.autograd.grad(y, leaves, dy.transpose(1, 2).reshape(2, 64, -1))])
    for eager, compiled in zip(*both, strict=True):
        torch.testing.assert_close(compiled, eager)
