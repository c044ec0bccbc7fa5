"""RMSNorm, RoPE and attention against torch's own or written-out forms."""

import math

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.attention import Attention
from nanochat_cli.model.norm import RMSNorm
from nanochat_cli.model.rope import apply_rope, rope_table


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rms_norm_equals_torch():
    norm = RMSNorm(32, 1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator(0)))
    x = torch.randn(3, 5, 32, generator=generator(1)) * 4
    torch.testing.assert_close(norm(x), torch.nn.functional.rms_norm(x, (32,), norm.weight, 1e-5))


def test_rope_is_multiplication_by_unit_complex_numbers():
    """Pair (x_i, x_{i + D/2}) is the complex number x_i + i x_{i + D/2}, turned by t · θ^(-2i/D)."""
    head_dim, theta, length = 16, 10000.0, 11
    x = torch.randn(2, length, 3, head_dim, generator=generator(2))
    cos, sin = rope_table(length, head_dim, theta)
    rotated = apply_rope(x, cos, sin)
    for t in range(length):
        for i in range(head_dim // 2):
            turn = complex(math.cos(t * theta ** (-2 * i / head_dim)), math.sin(t * theta ** (-2 * i / head_dim)))
            pairs = torch.complex(x[:, t, :, i], x[:, t, :, i + head_dim // 2]) * turn
            torch.testing.assert_close(rotated[:, t, :, i], pairs.real, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rotated[:, t, :, i + head_dim // 2], pairs.imag, rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_the_distance_only():
    cos, sin = rope_table(40, 32, 10000.0)
    q, k = (torch.randn(1, 1, 1, 32, generator=generator(s)) for s in (3, 4))

    def score(a: int, b: int) -> float:
        return float(
            (apply_rope(q, cos[a : a + 1], sin[a : a + 1]) * apply_rope(k, cos[b : b + 1], sin[b : b + 1])).sum()
        )

    assert score(7, 3) == pytest.approx(score(37, 33), abs=1e-4)


def config(n_kv_heads: int, **options: object) -> ModelConfig:
    return ModelConfig.model_validate(
        {
            "vocab_size": 64,
            "dim": 64,
            "n_layers": 1,
            "n_heads": 4,
            "n_kv_heads": n_kv_heads,
            "max_seq_len": 32,
            "ffn_dim": 64,
        }
        | options
    )


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"attention_gate": True}], ids=str)
def test_attention_equals_a_loop_over_heads_and_positions(n_kv_heads, options):
    settings = config(n_kv_heads, quant={"enabled": False}, **options)
    attention = Attention(settings, 0)
    rows = 32 if options.get("attention_gate") else 16  # of wq for a head: its query, then its gate
    for name, parameter in attention.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator(hash(name) % 1000))
    norm, before = RMSNorm(64, 1e-5), torch.randn(2, 6, 64, generator=generator(5))
    cos, sin = rope_table(6, 16, 10000.0)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=generator(6)))
        got, x = attention(before, norm, cos, sin), norm(before)
        for batch in range(2):
            for t in range(6):
                heads = []
                for h in range(4):
                    kv = h // (4 // n_kv_heads)
                    of_head = attention.wq.weight[h * rows : h * rows + rows]
                    q = x[batch] @ of_head[:16].T
                    k = x[batch] @ attention.wk.weight[kv * 16 : kv * 16 + 16].T
                    v = x[batch] @ attention.wv.weight[kv * 16 : kv * 16 + 16].T
                    if attention.q_norm is not None and attention.k_norm is not None:
                        q, k = attention.q_norm(q), attention.k_norm(k)
                    q = apply_rope(q[None, :, None], cos, sin)[0, :, 0]
                    k = apply_rope(k[None, :, None], cos, sin)[0, :, 0]
                    scores = torch.softmax(q[t] @ k[: t + 1].T / 4.0, dim=-1)
                    gate = x[batch, t] @ of_head[16:].T
                    heads.append(scores @ v[: t + 1] / (1 + torch.exp(-gate) if len(gate) else 1))
                expected = torch.cat(heads) @ attention.wo.weight.T
                torch.testing.assert_close(got[batch, t], expected, rtol=1e-4, atol=1e-5)
