"""The packed runtime computes what training computes, for every combination of architectures."""

import pytest
import torch

from nanochat_cli.inference.pack import PackedExperts, Projection
from nanochat_cli.inference.packed_model import PackedTransformer
from nanochat_cli.model.bitlinear import BitLinear, Joint
from nanochat_cli.model.cache import KVCache
from nanochat_cli.model.moe import Experts
from tests.architectures import COMBINATIONS, build

TOKENS = torch.randint(288, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_packed_logits_are_those_of_training(combination):
    model = build(combination)
    with torch.no_grad():
        expected = model.logits(model(TOKENS))
    packed = PackedTransformer.from_model(model, fused=False)
    assert (packed.logits(packed(TOKENS)) - expected).abs().max() <= 1e-4


def operations(module: torch.nn.Module) -> list[Joint | Experts]:
    return [one for part in module.modules() for one in vars(part).values() if isinstance(one, Joint | Experts)]


def contents(module: torch.nn.Module) -> list[dict[str, object]]:
    """Every attribute of every part: its mode, its operations, its parameters and children by name."""
    attributes = [vars(part) for part in module.modules()]
    return [{key: dict(v) if isinstance(v, dict) else v for key, v in part.items()} for part in attributes]


@pytest.mark.parametrize("combination", [c for c in COMBINATIONS if c.endswith("untied")])
def test_packing_exchanges_every_operation_of_a_copy_and_leaves_the_model_as_it_is(combination):
    model = build(combination).train()
    before, state = contents(model), {key: value.clone() for key, value in model.state_dict().items()}
    body = PackedTransformer.from_model(model).body
    assert contents(model) == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    exchanged = operations(body)
    assert len(exchanged) == len(operations(model))
    assert all(isinstance(one, Projection | PackedExperts) for one in exchanged)
    assert not any(isinstance(module, BitLinear) or module.training for module in body.modules())
    kept = {key: value.data_ptr() for key, value in body.named_parameters()}
    assert kept == {key: p.data_ptr() for key, p in model.named_parameters() if key in kept}  # shared, not copied


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
