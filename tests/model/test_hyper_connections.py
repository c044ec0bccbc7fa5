"""mHC-lite: exact double stochasticity, the plain residual for one stream, and streams that do not stay copies."""

import itertools
import math

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.hyper_connections import (
    HyperConnection,
    collapse_streams,
    expand_streams,
    initial_logits,
    permutation_matrices,
    read_streams,
    write_streams,
)
from nanochat_cli.model.transformer import Transformer

SHAPE = {"vocab_size": 64, "dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 64, "max_seq_len": 32}


def model(streams: int, **mhc) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.model_validate({**SHAPE, "mhc": {"streams": streams, **mhc}}))


@pytest.mark.parametrize("n", [2, 4])
def test_the_mixing_is_doubly_stochastic_for_random_and_extreme_logits(n):
    config = ModelConfig.model_validate({**SHAPE, "mhc": {"streams": n, "dynamic": False}})
    mix = HyperConnection(config, 0)
    generator = torch.Generator().manual_seed(n)
    count = len(mix.res_bias)
    cases = [torch.randn(count, generator=generator) * scale for scale in (0.1, 1.0, 10.0, 100.0) for _ in range(250)]
    cases += [torch.zeros(count), torch.full((count,), 1e30), torch.full((count,), -1e30)]
    cases += [1e4 * torch.nn.functional.one_hot(torch.tensor(i), count).float() for i in range(count)]
    assert len(cases) > 1000
    for logits in cases:
        mix.res_bias.data = logits
        res = mix.coefficients(torch.zeros(1, 1, n, SHAPE["dim"])).res
        assert (res >= 0).all()
        assert (res.sum(dim=-1) - 1).abs().max() <= 1e-6
        assert (res.sum(dim=-2) - 1).abs().max() <= 1e-6


def test_permutations_are_all_of_them_identity_first():
    matrices = permutation_matrices(4)
    assert len(matrices.flatten(1).unique(dim=0)) == 24
    assert torch.equal(matrices[0], torch.eye(4))
    assert torch.equal(matrices.sum(dim=-1), torch.ones(24, 4))


def test_reading_and_writing_are_the_products_of_the_definition():
    x, y = torch.randn(2, 5, 4, 8), torch.randn(2, 5, 8)
    pre, post, res = torch.rand(2, 5, 4), torch.rand(2, 5, 4), torch.rand(2, 5, 4, 4)
    assert torch.allclose(read_streams(x, pre), torch.einsum("bti,btic->btc", pre, x), atol=1e-6)
    expected = torch.einsum("btij,btjc->btic", res, x) + post.unsqueeze(-1) * y.unsqueeze(-2)
    assert torch.allclose(write_streams(x, y, post, res), expected, atol=1e-6)
    static = write_streams(x, y, post[0, 0], res[0, 0])
    expected = torch.einsum("ij,btjc->btic", res[0, 0], x) + post[0, 0][:, None] * y.unsqueeze(-2)
    assert torch.allclose(static, expected, atol=1e-6)


def test_one_stream_is_the_plain_residual_bit_for_bit():
    plain = Transformer(ModelConfig.model_validate(SHAPE))
    one = model(1)
    one.load_state_dict(plain.state_dict())
    one.requantize()
    tokens = torch.randint(64, (2, 16))
    assert torch.equal(plain(tokens), one(tokens))
    assert not list(one.hyper_connections())


def test_one_stream_mixed_with_unit_coefficients_is_the_plain_residual_bit_for_bit():
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    streams, one = expand_streams(x, 1), torch.ones(1)
    assert torch.equal(read_streams(streams, one), x)
    assert torch.equal(collapse_streams(write_streams(streams, y, one, torch.ones(1, 1))), x + y)


@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("dynamic", [True, False])
def test_streams_differ_and_every_parameter_gets_a_gradient_after_some_steps(streams, dynamic):
    network = model(streams, dynamic=dynamic)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    tokens = torch.randint(64, (4, 17), generator=torch.Generator().manual_seed(1))
    seen: dict[str, torch.Tensor] = {}
    network.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.__setitem__("streams", out.detach()))
    for _ in range(6):
        optimizer.zero_grad()
        logits = network.logits(network(tokens[:, :-1]))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        network.requantize()
    x = torch.nn.functional.normalize(seen["streams"], dim=-1)
    cosine = x @ x.mT
    pairs = ~torch.eye(streams, dtype=torch.bool)
    assert cosine[..., pairs].mean() < 0.999
    for name, mix in network.hyper_connections():
        for parameter_name, parameter in mix.named_parameters():
            assert parameter.grad is not None, name
            # The first mixing acts on copies and after the last only the mean counts: neither affects the output.
            unseen = name in ("blocks.0.attention_mix", f"blocks.{SHAPE['n_layers'] - 1}.ffn_mix")
            if not (unseen and parameter_name == "res_bias"):
                assert parameter.grad.abs().max() > 1e-12, (name, parameter_name)


@pytest.mark.parametrize("init", ["identity", "balanced", "high-entropy", "layer-dependent"])
def test_initial_mixing_matches_its_name(init):
    first, last = (initial_logits(init, 24, layer, 12).softmax(0)[0].item() for layer in (0, 11))
    expected = {
        "identity": (0.99, 0.99),
        "balanced": (0.5, 0.5),
        "high-entropy": (1 / 24, 1 / 24),
        "layer-dependent": (0.5, 0.99),
    }[init]
    assert (first, last) == pytest.approx(expected, abs=0.01)


def test_mixing_parameters_stay_float32_under_autocast():
    network = model(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = network(torch.randint(64, (1, 8)))
    assert out.isfinite().all()
    assert all(p.dtype == torch.float32 for _, mix in network.hyper_connections() for p in mix.parameters())


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def definition(mix: HyperConnection, x: list[list[float]]) -> tuple[list[float], list[float], list[list[float]]]:
    """pre, post and res of one token with streams x [n][C], in loops (arXiv:2601.05732, arXiv:2512.24880)."""
    n, flat = len(x), [value for stream in x for value in stream]
    scale = (sum(value * value for value in flat) / len(flat) + mix.eps) ** -0.5
    biases = [bias.tolist() for bias in (mix.pre_bias, mix.post_bias, mix.res_bias)]
    gates, rows = mix.gates.tolist(), iter(mix.projection.tolist())
    pre, post, logits = (
        [b + gate * sum(w * value * scale for w, value in zip(next(rows), flat, strict=True)) for b in bias]
        for gate, bias in zip(gates, biases, strict=True)
    )
    shares = [math.exp(logit) for logit in logits]
    res = [[0.0] * n for _ in range(n)]
    for share, order in zip(shares, itertools.permutations(range(n)), strict=True):
        for i in range(n):
            res[i][order[i]] += share / sum(shares)  # stream i becomes what stream order[i] was
    return [sigmoid(value) for value in pre], [2 * sigmoid(value) for value in post], res


@pytest.mark.parametrize("n", [2, 4])
@torch.no_grad()
def test_a_block_computes_the_papers_formulas(n):
    """u = Σ pre_j x_j,   x'_i = Σ_j res_ij x_j + post_i F(norm(u)), for attention and then for the feed-forward."""
    network = model(n)
    block, generator = network.blocks[1], torch.Generator().manual_seed(n)
    for mix in (block.attention_mix, block.ffn_mix):
        for parameter in mix.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    length, width = 3, SHAPE["dim"]
    x = torch.randn(1, length, n, width, generator=generator)
    cos, sin = network.cos[:length], network.sin[:length]
    found = block(x, cos, sin)

    streams = x[0].tolist()  # [T][n][C]
    for mix, sublayer in (
        (block.attention_mix, lambda u: block.attention(u, block.attention_norm, cos, sin)),
        (block.ffn_mix, lambda u: block.feed_forward(block.ffn_norm(u))),
    ):
        coefficients = [definition(mix, token) for token in streams]
        read = [
            [sum(pre[j] * token[j][c] for j in range(n)) for c in range(width)]
            for token, (pre, _, _) in zip(streams, coefficients, strict=True)
        ]
        y = sublayer(torch.tensor([read]))[0].tolist()
        streams = [
            [
                [sum(res[i][j] * token[j][c] for j in range(n)) + post[i] * y[t][c] for c in range(width)]
                for i in range(n)
            ]
            for t, (token, (_, post, res)) in enumerate(zip(streams, coefficients, strict=True))
        ]
    torch.testing.assert_close(found[0], torch.tensor(streams), atol=2e-3, rtol=1e-3)


def test_the_mixing_moves_streams_in_the_written_direction():
    """All mass on the permutation (1, 2, 3, 0): every stream becomes the next one, and the last the first."""
    mix = HyperConnection(ModelConfig.model_validate({**SHAPE, "mhc": {"streams": 4, "dynamic": False}}), 0)
    place = list(itertools.permutations(range(4))).index((1, 2, 3, 0))
    mix.res_bias.data = 1e4 * torch.nn.functional.one_hot(torch.tensor(place), 24).float()
    x = torch.arange(4.0)[None, None, :, None].expand(1, 1, 4, SHAPE["dim"])
    _, _, _, res = mix(x)
    moved = write_streams(x, torch.zeros(1, 1, SHAPE["dim"]), torch.zeros(4), res)
    assert moved[0, 0, :, 0].tolist() == [1, 2, 3, 0]


def test_a_write_gate_with_a_bias_of_zero_writes_one_and_its_range_ends_at_two():
    mix = HyperConnection(ModelConfig.model_validate({**SHAPE, "mhc": {"streams": 4, "dynamic": False}}), 0)
    mix.post_bias.data = torch.tensor([0.0, 50.0, -50.0, math.log(3)])
    assert mix(torch.zeros(1, 1, 4, SHAPE["dim"])).post.tolist() == pytest.approx([1.0, 2.0, 0.0, 1.5], abs=1e-6)
