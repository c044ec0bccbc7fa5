"""The gated delta rule: chunks against the recurrence, the recurrence against the formula, gradients in float64."""

import itertools

import pytest
import torch

from nanochat_cli.model.delta_rule import chunked_delta_rule, recurrent_delta_rule

LENGTHS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 128, 200, 255, 300)


def inputs(length: int, *, heads: int = 2, width: int = 8, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = (draw(2, heads, length, width) for _ in range(3))
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    return q, k, v, -torch.nn.functional.softplus(draw(2, heads, length)), draw(2, heads, length).sigmoid()


def test_one_token_writes_what_the_formula_says():
    q, k, v, log_decay, beta = inputs(1, heads=1, dtype=torch.float64)
    before = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    y, after = recurrent_delta_rule(q, k, v, log_decay, beta, before)
    for row in range(2):
        state = before[row, 0] * log_decay[row, 0, 0].exp()
        key = k[row, 0, 0]
        state = state + torch.outer(key, beta[row, 0, 0] * (v[row, 0, 0] - state.T @ key))
        assert torch.allclose(after[row, 0], state, atol=1e-12)
        assert torch.allclose(y[row, 0, 0], state.T @ q[row, 0, 0], atol=1e-12)


@pytest.mark.parametrize("chunk", [16, 32, 64])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_equal_the_recurrence(length, chunk):
    arguments = inputs(length)
    state = torch.randn(2, 2, 8, 8)
    expected, expected_state = recurrent_delta_rule(*arguments, state)
    found, found_state = chunked_delta_rule(*arguments, state, chunk)
    assert (found - expected).abs().max() < 1e-5
    assert (found_state - expected_state).abs().max() < 1e-5


def test_every_length_from_1_to_300_in_one_pass():
    """The recurrence over 300 tokens holds the answer for every shorter one: chunks see a prefix only."""
    q, k, v, log_decay, beta = inputs(300, heads=1)
    expected, _ = recurrent_delta_rule(q, k, v, log_decay, beta)
    for chunk in (16, 32, 64):
        for length in range(1, 301):
            prefix = (t[:, :, :length] for t in (q, k, v, log_decay, beta))
            found, _ = chunked_delta_rule(*prefix, chunk=chunk)
            assert (found - expected[:, :, :length]).abs().max() < 1e-5, (length, chunk)


def test_strong_decay_and_repeated_keys_stay_finite_and_equal():
    q, k, v, _, _ = inputs(96)
    k = k[:, :, :1].expand_as(k)
    log_decay = torch.full(k.shape[:3], -30.0)
    log_decay[..., ::7] = 0.0
    beta = torch.ones(k.shape[:3])
    expected, _ = recurrent_delta_rule(q, k, v, log_decay, beta)
    found, _ = chunked_delta_rule(q, k, v, log_decay, beta, chunk=32)
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", [recurrent_delta_rule, chunked_delta_rule])
def test_gradients_in_float64(form):
    arguments = [t.requires_grad_() for t in inputs(7, heads=1, width=3, dtype=torch.float64)]
    options = {"chunk": 4} if form is chunked_delta_rule else {}
    assert torch.autograd.gradcheck(lambda *a: form(*a, **options), arguments)


def test_gradients_of_chunks_equal_those_of_the_recurrence():
    gradients = []
    for form in (recurrent_delta_rule, chunked_delta_rule):
        arguments = [t.requires_grad_() for t in inputs(50, seed=3)]
        form(*arguments)[0].square().sum().backward()
        gradients.append([t.grad for t in arguments])
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() < 2e-5 * max(1.0, expected.abs().max().item())


def fake_chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
    """The documented contract of fla.ops.gated_delta_rule by the rule itself, token by token.

    q, k [B, T, H, K]; v [B, T, H, V]; g (the logarithm of the decay), beta [B, T, H]; scale of q, K^-0.5 by default;
    o [B, T, H, V] in q's dtype, and the final state or None.
    """
    batch, length, heads, width = q.shape
    assert k.shape == q.shape
    assert v.shape[:3] == g.shape == beta.shape == (batch, length, heads)
    assert all(t.is_contiguous() for t in (q, k, v, g, beta))
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert g.dtype == torch.float32
    assert initial_state is None
    assert not output_final_state
    scale, o = width**-0.5 if scale is None else scale, torch.empty(v.shape)
    for b, h in itertools.product(range(batch), range(heads)):
        state = torch.zeros(width, v.shape[-1])
        for t in range(length):
            key = k[b, t, h].float()
            state = state * g[b, t, h].exp()
            state = state + torch.outer(key, beta[b, t, h] * (v[b, t, h].float() - state.T @ key))
            o[b, t, h] = state.T @ (q[b, t, h].float() * scale)
    return o.to(q.dtype), None


def test_flash_linear_attention_is_called_as_it_documents(monkeypatch):
    """Layout, order and scale: its answer is that of the recurrence. No two sizes are equal, so that no layout fits by
    chance; the rounding is that of bfloat16."""
    import sys
    from types import ModuleType

    from nanochat_cli.model.fla_delta_rule import fla_delta_rule

    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = fake_chunk_gated_delta_rule  # pyright: ignore[reportAttributeAccessIssue]
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    q, k, v, log_decay, beta = inputs(7, heads=3, width=16)
    v = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(1))
    rounded = [t.bfloat16().float() for t in (q, k, v)]
    expected, _ = recurrent_delta_rule(*rounded, log_decay, beta)
    found = fla_delta_rule(q, k, v, log_decay, beta)
    assert found.dtype == torch.float32
    assert found.shape == (2, 3, 7, 5)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2**-7)
