"""Names, row order and metadata of the architectures, checked against llama.cpp's own converter and gguf's tables."""

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.formats.gguf.architecture import (
    ARCHITECTURES,
    BITNET,
    LLAMA,
    QWEN3,
    architecture_of,
    config_from_metadata,
    metadata,
)
from nanochat_cli.formats.gguf.tensor_names import file_row_order, tensor_name
from nanochat_cli.model.rope import apply_rope, rope_table
from tests.inference.tiny_models import spread_model, tiny_config

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
    "bitnet": {"sub_norm": True, "tie_embeddings": True},
}


@pytest.mark.parametrize("arch", CONFIGS)
def test_the_model_decides_the_architecture(arch: str) -> None:
    assert architecture_of(tiny_config(**CONFIGS[arch])).name == arch


def test_an_untied_model_with_sub_norms_is_refused_and_told_what_would_fit() -> None:
    with pytest.raises(ConfigError, match=r"tie_embeddings = true.*arch llama"):
        architecture_of(tiny_config(sub_norm=True))


def test_bitnet_needs_heads_that_fill_the_width() -> None:
    with pytest.raises(ConfigError, match="n_heads × head_dim = dim, not 128 and 256"):
        architecture_of(tiny_config(sub_norm=True, tie_embeddings=True, head_dim=32))


@pytest.mark.parametrize("arch", CONFIGS)
def test_every_tensor_has_a_name_that_gguf_knows_for_the_architecture(arch: str) -> None:
    config = tiny_config(**CONFIGS[arch])
    ours = [tensor_name(key, config) for key in spread_model(config).state_dict()]
    kind = next(value for value, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    known = {
        f"{gguf.TENSOR_NAMES[tensor].format(bid=layer)}.weight"
        for tensor in gguf.MODEL_TENSORS[kind]
        for layer in range(config.n_layers)
    }
    assert len(set(ours)) == len(ours)
    optional = ("output.", "rope_freqs.", "attn_rot", "_exp", "_inp", "_shexp")
    assert set(ours) <= known
    assert {name for name in known if not any(part in name for part in optional)} <= set(ours)


def test_only_queries_and_keys_of_llama_change_their_row_order() -> None:
    config = tiny_config()
    keys = list(spread_model(config).state_dict())
    moved = [key for key in keys if file_row_order(LLAMA, key, config) is not None]
    assert moved == [key for key in keys if ".wq." in key or ".wk." in key]
    assert all(file_row_order(arch, key, config) is None for arch in (QWEN3, BITNET) for key in keys)


@pytest.mark.parametrize("key", ["blocks.0.attention.wq.weight", "blocks.1.attention.wk.weight"])
def test_row_order_equals_llama_cpps_converter(key: str) -> None:
    config = tiny_config(n_heads=4, n_kv_heads=2)
    order = file_row_order(LLAMA, key, config)
    assert order is not None
    weight = np.random.default_rng(0).standard_normal((len(order), 3))
    heads = 4 if ".wq." in key else 2
    # LlamaModel.permute of convert_hf_to_gguf.py
    expected = weight.reshape(heads, 2, weight.shape[0] // heads // 2, 3).swapaxes(1, 2).reshape(weight.shape)
    assert np.array_equal(weight[order], expected)
    assert np.array_equal(weight[order][np.argsort(order)], weight)


def test_rotating_neighbours_of_permuted_rows_equals_rotating_halves() -> None:
    config = tiny_config(n_heads=2, n_kv_heads=2, dim=16, ffn_dim=32)
    order = file_row_order(LLAMA, "blocks.0.attention.wq.weight", config)
    cos, sin = rope_table(5, 8, 10000.0)
    q = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
    ours = apply_rope(q, cos, sin)
    permuted = q.reshape(1, 5, 16)[..., order].reshape(1, 5, 2, 4, 2)
    even, odd = permuted[..., 0], permuted[..., 1]
    c, s = cos[:, None, :], sin[:, None, :]
    neighbours = torch.stack((even * c - odd * s, odd * c + even * s), dim=-1).reshape(1, 5, 16)
    torch.testing.assert_close(neighbours, ours.reshape(1, 5, 16)[..., order])


@pytest.mark.parametrize(
    "overrides", [{}, {"rope_theta": 50000.0, "norm_eps": 1e-6}, {"head_dim": 32}, {"n_kv_heads": 1}]
)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_metadata_is_complete_enough_to_rebuild_the_configuration(arch: str, overrides: dict[str, Any]) -> None:
    config = tiny_config(**{**CONFIGS[arch], **overrides})
    fields = {key: float(np.float32(v)) if isinstance(v, float) else v for key, v in metadata(config).items()}
    rebuilt = config_from_metadata({"general.architecture": arch, **fields}, config.tie_embeddings, QuantConfig())
    assert metadata(rebuilt) == metadata(config)
    assert rebuilt.norm_eps == config.norm_eps


def bad(**changes: Any) -> dict[str, Any]:
    fields = {"general.architecture": "llama", **metadata(tiny_config())}
    for key, value in changes.items():
        fields[key.replace("__", ".")] = value
    return {key: value for key, value in fields.items() if value is not None}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "architecture 'None' is not one"),
        (bad(general__architecture="mamba"), "architecture 'mamba' is not one"),
        (bad(llama__embedding_length=None), "llama.embedding_length is missing"),
        (bad(llama__block_count="two"), "llama.block_count is not a number"),
        (bad(llama__block_count=0), "block_count = 0 is not a valid count"),
        (bad(llama__attention__head_count=0), "head_count = 0 is not a valid count"),
        (bad(llama__attention__head_count_kv=3), "do not fit together"),
        (bad(llama__attention__value_length=32), "value_length = 32 differs"),
        (bad(llama__rope__dimension_count=16), "dimension_count = 16 differs"),
    ],
    ids=str,
)
def test_unsupported_hyper_parameters_are_one_clear_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        config_from_metadata(fields, tied=False, quant=QuantConfig())
    assert "\n" not in str(error.value)


def test_defaults_of_llama_cpp_apply_where_a_file_says_nothing() -> None:
    fields = bad(
        llama__attention__head_count_kv=None,
        llama__attention__key_length=None,
        llama__attention__value_length=None,
        llama__rope__dimension_count=None,
        llama__rope__freq_base=None,
    )
    config: ModelConfig = config_from_metadata(fields, tied=False, quant=QuantConfig())
    assert (config.n_kv_heads, config.resolved_head_dim, config.rope_theta) == (4, 64, 10000.0)


def test_every_architecture_is_listed() -> None:
    assert set(ARCHITECTURES) == {*CONFIGS, "qwen3moe", "qwen35", "nanochat-ternary"}  # those in tests/conformance
