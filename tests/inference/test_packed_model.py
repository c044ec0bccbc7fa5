"""The packed model against the model it was made from.

Unfused it differs in the linear layers only, which are exact integers: the logits must be equal to the last bit for
one scale a row. Fused, norms differ in the last bit, so that an activation beside a rounding tie may take another
code: there prompts count that such a disturbance does not move, as in export.verify.
"""

import logging

import pytest
import torch

from nanochat_cli.inference.generate import generate_tokens
from nanochat_cli.inference.pack import DenseProjection, PackedProjection
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.inference.sampling import SamplingConfig
from nanochat_cli.model.cache import KVCache, StaticCache
from nanochat_cli.model.transformer import Transformer
from nanochat_kernels import backends
from nanochat_kernels.backends import Unsupported
from tests.inference.tiny_models import spread_model, tiny_config

SHAPES = [
    {},
    {"qk_norm": True, "n_kv_heads": 1},
    {"sub_norm": True, "tie_embeddings": True, "n_kv_heads": 4},
    {"tie_embeddings": True, "head_dim": 128},
]
GROUPS = ["row", "tensor", 256, 128, 64]
N_PROMPTS, LENGTH = 32, 6
LAST_BITS = 4e-7
"""Relative; a few units in the last place of float32."""


def prompts(count: int = N_PROMPTS, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_unfused_logits_equal_the_trained_models_to_the_last_bit(shape, scale, backend):
    model = spread_model(tiny_config(**shape, quant={"scale": scale}))
    packed = PackedTransformer.from_model(model, backend, fused=False)
    assert torch.equal(packed.logits(packed(prompts())), model.logits(model(prompts())))


@pytest.mark.parametrize("scale", GROUPS)
@torch.no_grad()
def test_the_codes_and_scales_are_those_of_training(scale):
    model = spread_model(tiny_config(quant={"scale": scale}))
    packed = PackedTransformer.from_model(model)
    for block, source in zip(packed.body.blocks, model.blocks, strict=True):
        projection = block.attention.qkv
        assert isinstance(projection, PackedProjection)
        found = projection.weight.ternary()
        parts = [layer.ternary() for layer in (source.attention.wq, source.attention.wk, source.attention.wv)]
        assert torch.equal(found.codes, torch.cat([part.codes for part in parts]))
        assert torch.equal(found.dequantize(), torch.cat([part.dequantize() for part in parts]))


@torch.no_grad()
def stable(model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Which prompts, bool [B], have logits that do not depend on the last bits of every norm."""
    from nanochat_cli.model.norm import RMSNorm

    exact = model.logits(model(tokens))
    keeps = torch.ones(len(tokens), dtype=torch.bool)
    forward = RMSNorm.forward
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)

        def disturbed(norm, x, generator=generator):
            y = forward(norm, x)
            return y * (1 + LAST_BITS * (2 * torch.rand(y.shape, generator=generator) - 1))

        with monkeypatch.context() as patch:
            patch.setattr(RMSNorm, "forward", disturbed)
            keeps &= (model.logits(model(tokens)) - exact).abs().amax(dim=(1, 2)) < 2e-5
    return keeps


@pytest.mark.parametrize("scale", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_fused_logits_agree_where_no_activation_is_at_a_tie(shape, scale, monkeypatch):
    model = spread_model(tiny_config(**shape, quant={"scale": scale}))
    packed = PackedTransformer.from_model(model)
    tokens = prompts()
    difference = (packed.logits(packed(tokens)) - model.logits(model(tokens))).abs().amax(dim=(1, 2))
    keeps = stable(model, tokens, monkeypatch)
    assert keeps.sum() >= N_PROMPTS // 4
    agree = difference[keeps] <= 1e-4
    assert agree.float().mean() >= 0.75, difference
    assert difference.max() <= 0.2  # a few codes at most, not another model: logits have a standard deviation near 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_token_by_token_in_native_code_equals_reading_all_at_once(shape, monkeypatch):
    model = spread_model(tiny_config(**shape))
    packed = PackedTransformer.from_model(model)
    assert packed._native is not None
    tokens = prompts()
    expected = model.logits(model(tokens))
    differences = []
    for row in range(N_PROMPTS):
        cache = KVCache(model.config, 1, LENGTH + 3)
        steps = [packed.next_logits(tokens[row : row + 1, i : i + 1], cache) for i in range(LENGTH)]
        assert cache.length == LENGTH
        differences.append(float((torch.cat(steps) - expected[row]).abs().max()))
    keeps = stable(model, tokens, monkeypatch)
    agree = torch.tensor(differences)[keeps] <= 1e-4
    assert agree.float().mean() >= 0.75, differences


@torch.no_grad()
def test_a_prompt_then_single_tokens_use_one_cache():
    """Reading 4 tokens at once and 2 in native code gives the logits of reading 6 natively."""
    model = spread_model(tiny_config(qk_norm=True))
    packed = PackedTransformer.from_model(model)
    agreeing = 0
    for row in prompts(12, seed=3):
        mixed, single = (KVCache(model.config, 1, LENGTH) for _ in range(2))
        packed.next_logits(row[None, :4], mixed)
        ours = [packed.next_logits(row[None, i : i + 1], mixed) for i in (4, 5)]
        theirs = [packed.next_logits(row[None, i : i + 1], single) for i in range(LENGTH)][4:]
        agreeing += bool((torch.cat(ours) - torch.cat(theirs)).abs().max() <= 1e-4)
    assert agreeing >= 8  # the others have a rounding tie


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_the_static_step_of_the_cuda_graph_equals_the_cached_forward(shape):
    model = spread_model(tiny_config(**shape))
    packed = PackedTransformer.from_model(model, fused=False)
    tokens = prompts(3)
    expected_cache, cache = (KVCache(model.config, 3, 9) for _ in range(2))
    for i in range(LENGTH):
        step = tokens[:, i : i + 1]
        expected = packed.logits(packed(step, expected_cache))[:, -1]
        found = packed.logits(packed(step, StaticCache(cache, torch.full((3,), i))))[:, -1]
        cache.advance(1)
        # The masked positions change the order of sums in attention, hence the codes at ties.
        assert ((found - expected).abs().amax(dim=-1) <= 1e-4).sum() >= 2
    torch.testing.assert_close(cache.values[0], expected_cache.values[0], rtol=0, atol=0)


@torch.no_grad()
def test_the_static_step_takes_every_row_at_its_own_place():
    """Float activations: the masked positions change the order of sums, which the int8 grid could make a whole step."""
    model = spread_model(tiny_config(qk_norm=True, quant={"activations": False}))
    tokens, lengths = prompts(3), [2, 5, 3]
    cache = KVCache(model.config, 3, 9)
    expected = []
    for row, length in enumerate(lengths):
        model(tokens[row : row + 1, :length], cache.row(row))
        alone = KVCache(model.config, 1, 9)
        model(tokens[row : row + 1, :length], alone)
        expected.append(model.next_logits(tokens[row : row + 1, -1:], alone))
    found = model.logits(model(tokens[:, -1:], StaticCache(cache, torch.tensor(lengths))))[:, -1]
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=2e-5)


@torch.no_grad()
def test_greedy_generation_is_that_of_the_trained_model():
    model = spread_model(tiny_config(qk_norm=True))
    packed = PackedTransformer.from_model(model, fused=False)
    sampling = SamplingConfig(max_tokens=20, temperature=0)
    rows = prompts(3, 5).tolist()
    assert list(generate_tokens(packed, rows, sampling)) == list(generate_tokens(model, rows, sampling))


def test_generation_continues_beyond_the_context_and_is_the_same_for_the_same_seed():
    packed = PackedTransformer.from_model(spread_model(tiny_config(max_seq_len=16)))
    sampling = SamplingConfig(max_tokens=40, temperature=1.0, seed=4)
    runs = [list(generate_tokens(packed, [[1, 2, 3]], sampling)) for _ in range(2)]
    assert len(runs[0]) == 40
    assert runs[0] == runs[1]


def test_its_memory_is_two_bits_a_weight_and_what_is_not_ternary():
    config = tiny_config(vocab_size=100, tie_embeddings=True)
    packed = PackedTransformer.from_model(spread_model(config))
    rows_and_columns = [(256 + 2 * 128, 256), (256, 256), (2 * 512, 256), (256, 512)]
    ternary = sum(rows * columns // 4 + 4 * rows for rows, columns in rows_and_columns)
    assert packed.bytes == config.n_layers * ternary + 4 * 100 * 256


def test_an_embedding_that_float16_represents_exactly_is_kept_in_float16():
    model = spread_model(tiny_config())
    with torch.no_grad():
        model.embedding.weight.copy_(model.embedding.weight.half())
    packed = PackedTransformer.from_model(model)
    assert packed.embedding.dtype == torch.float16
    assert packed.head.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        {"quant": {"enabled": False}},
        {"quant": {"activations": False}},
        {"dim": 192, "n_heads": 3, "n_kv_heads": 3, "ffn_dim": 320},
    ],
    ids=str,
)
@torch.no_grad()
def test_what_cannot_be_packed_is_computed_in_float(config):
    model = spread_model(tiny_config(**config))
    packed = PackedTransformer.from_model(model)
    assert all(isinstance(projection, DenseProjection) for projection in packed.projections)
    assert packed._native is None
    torch.testing.assert_close(packed.logits(packed(prompts())), model.logits(model(prompts())), rtol=0, atol=1e-4)


@torch.no_grad()
def test_without_a_compiler_it_computes_the_same_in_float_and_says_why(monkeypatch, caplog):
    def no_compiler():
        raise Unsupported("no C compiler (cc, gcc, clang): install one")

    monkeypatch.setattr(backends.load("cpu"), "library", no_compiler)
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("NANOCHAT_BACKEND", raising=False)
    model = spread_model(tiny_config())
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        packed = PackedTransformer.from_model(model)
    assert len([record for record in caplog.records if "no C compiler" in record.message]) == 1
    assert torch.equal(packed.logits(packed(prompts())), model.logits(model(prompts())))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ({"attention_gate": True}, torch.float32, "gated attention"),
        ({"mhc": {"streams": 2}}, torch.float32, "hyper-connections (mHC)"),
        ({"moe": {"enabled": True, "experts": 4}}, torch.float32, "mixtures of experts (MoE)"),
        ({"deltanet": {"pattern": "DA"}, "qk_norm": True}, torch.float32, "gated DeltaNet layers"),
        ({}, torch.bfloat16, "activations of torch.bfloat16"),
    ],
    ids=str,
)
def test_what_native_code_has_no_form_of_is_named_once(shape, dtype, reason, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_said", set())
    model = Transformer(tiny_config(**shape)).eval()
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        packed = [PackedTransformer.from_model(model, "cpu", dtype=dtype) for _ in range(2)]
    assert [one._native for one in packed] == [None, None]
    said = [record.message for record in caplog.records]
    assert said == [f"backend cpu cannot compute whole tokens here ({reason}): a slower one does"]


@pytest.mark.parametrize(
    ("part", "reason"), [("attention.v_norm", "attention with v_norm"), ("hyena", "blocks with hyena")]
)
def test_a_part_that_native_code_does_not_know_is_named_too(part, reason, monkeypatch, caplog):
    monkeypatch.setattr(backends, "_said", set())
    model = spread_model(tiny_config())
    owner, _, name = part.rpartition(".")
    for block in model.blocks:
        block.get_submodule(owner).add_module(name, torch.nn.Identity())
    with caplog.at_level(logging.WARNING, logger="nanochat_kernels"):
        assert PackedTransformer.from_model(model, "cpu")._native is None
    assert reason in caplog.text


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="backend = avx does not exist"):
        PackedTransformer.from_model(spread_model(tiny_config()), "avx")
