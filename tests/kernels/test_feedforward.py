"""The feed-forward as one operation: equal bits and gradients as its composition, with and without filtered rows."""

import pytest
import torch

from nanochat_cli.training.cpp_compiler import find_compiler
from nanochat_kernels import KeptRows, quantize_input, swiglu_feed_forward
from nanochat_kernels.feedforward import swiglu_feed_forward_reference
from tests.kernels.test_bit_linear import FORMS, quantized, random

ROWS = 12
KEPT = torch.tensor([0, 3, 4, 9, 11])


def layers(scale="row"):
    latents = [random(*shape, seed=seed, grad=True) for seed, shape in enumerate([(256, 128), (256, 128), (128, 256)])]
    return latents, [quantized(latent, scale) for latent in latents]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", ["row", "tensor", 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_its_composition(form, scale, dtype):
    latents, weights = layers(scale)
    x, dy = random(3, 4, 128, seed=4, grad=True), random(3, 4, 128, seed=5)
    found = []
    for function in (swiglu_feed_forward, swiglu_feed_forward_reference):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = function(quantize_input(x, form), latents, weights, form)
        found.append((y, *torch.autograd.grad(y, (x, *latents), dy.to(y.dtype))))
    assert torch.equal(found[0][0], found[1][0])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert float((a - b).detach().norm() / b.norm()) < tolerance


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_rows_left_out_have_no_gradient_and_the_others_the_one_they_had(form, known):
    """Oracle: the composition's backward pass of dy with the rows left out set to zero."""
    latents, weights = layers()
    x, dy = random(ROWS, 128, seed=4, grad=True), random(ROWS, 128, seed=5)
    masked = torch.zeros_like(dy).index_copy_(0, KEPT, dy[KEPT])
    chosen = KeptRows.all_of(ROWS, known=known)
    if known:
        chosen.choose(KEPT)
    y = swiglu_feed_forward(quantize_input(x, form, chosen), latents, weights, form, chosen)
    saved = [len(t) for t in y.grad_fn.saved_tensors[:6]]
    assert saved == [len(KEPT) if known else ROWS] * 6
    chosen.choose(KEPT)
    reference = swiglu_feed_forward_reference(quantize_input(x, form), latents, weights, form)
    found = torch.autograd.grad(y, (x, *latents), dy)
    expected = torch.autograd.grad(reference, (x, *latents), masked)
    left_out = [row for row in range(ROWS) if row not in KEPT.tolist()]
    assert not found[0][left_out].any()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_keeping_every_row_is_the_plain_backward_pass_to_the_last_bit():
    latents, weights = layers()
    x, dy = random(ROWS, 128, seed=4, grad=True), random(ROWS, 128, seed=5)
    gradients = [
        torch.autograd.grad(
            swiglu_feed_forward(quantize_input(x, "float", kept), latents, weights, "float", kept), (x, *latents), dy
        )
        for kept in (None, KeptRows.all_of(ROWS))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_backward_reads_the_choice_made_after_the_forward_pass():
    if find_compiler().path is None:
        pytest.skip("no C++ compiler on this machine")
    latents, weights = layers()
    x, dy, chosen = random(ROWS, 128, seed=4, grad=True), random(ROWS, 128, seed=5), KeptRows.all_of(ROWS)

    def block(x):
        return swiglu_feed_forward(quantize_input(x, "int8"), latents, weights, "int8", chosen).sin()

    compiled = torch.compile(block, dynamic=False)
    for kept in (KEPT, torch.tensor([2, 8])):
        found = []
        for function in (compiled, block):
            chosen.choose(torch.arange(ROWS))
            y = function(x)
            chosen.choose(kept)
            found.append(torch.autograd.grad(y, (x, *latents), dy))
        for a, b in zip(*found, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-4  # a fused silu may round one code of h otherwise
