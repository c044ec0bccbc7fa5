"""The packed runtime computes what training computes, for every combination of architectures."""

import pytest
import torch

from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.model.cache import KVCache
from tests.architectures import COMBINATIONS, build

TOKENS = torch.randint(288, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_packed_logits_are_those_of_training(combination):
    model = build(combination)
    with torch.no_grad():
        expected = model.logits(model(TOKENS))
    packed = PackedTransformer.from_model(model, fused=False)
    assert (packed.logits(packed(TOKENS)) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c.endswith("untied")])
def test_reading_token_by_token_equals_reading_at_once(combination):
    model = build(combination, quant={"activations": False})  # int8 rounding could go either way at a tie
    packed = PackedTransformer.from_model(model, fused=False)
    for computes in (model, packed):
        cache = KVCache(model.config, 2, 32)
        with torch.no_grad():
            whole = computes.logits(computes(TOKENS))
            parts = [computes.logits(computes(part, cache)) for part in TOKENS.split([9, 1, 1, 6, 1, 1, 5], dim=1)]
        assert (torch.cat(parts, dim=1) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("combination", ["plain+hybrid+dense+tied", "mhc-2+hybrid+moe+untied"])
def test_a_snapshot_forgets_what_was_read_after_it(combination):
    model = build(combination)
    cache = KVCache(model.config, 2, 32)
    with torch.no_grad():
        model(TOKENS[:, :10], cache)
        snapshot = cache.snapshot()
        expected = model(TOKENS[:, 10:14], cache)
        cache.restore(snapshot)
        model(TOKENS[:, 3:9], cache)
        cache.restore(snapshot)
        assert torch.equal(model(TOKENS[:, 10:14], cache), expected)
    with pytest.raises(ValueError, match="recurrent state"):
        cache.truncate(2)


def test_the_state_of_a_deltanet_layer_does_not_grow():
    config = build("plain+hybrid+dense+tied").config
    short, long = KVCache(config, 1, 8), KVCache(config, 1, 64)
    assert long.bytes - short.bytes == 2 * 4 * config.n_kv_heads * config.resolved_head_dim * (64 - 8)  # one layer's
