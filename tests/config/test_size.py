"""The sections count what the built model has, over every option that changes its parameters."""

import pytest
import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.transformer import Transformer

SHAPES = [
    {},
    {"tie_embeddings": True},
    {"qk_norm": True},
    {"sub_norm": True, "tie_embeddings": True},
    {"n_kv_heads": 1, "head_dim": 32, "qk_norm": True},
    {"ffn_dim": None, "ffn_mult": 3.0, "n_kv_heads": 4, "sub_norm": True},
    {"attention_gate": True},
    {"mhc": {"streams": 2}},
    {"mhc": {"streams": 4, "dynamic": False}},
    {"deltanet": {"ratio": 0.5}, "qk_norm": True},
    {"deltanet": {"pattern": "DDA", "n_heads": 3, "head_dim": 32, "conv_kernel": 3}},
    {"moe": {"enabled": True, "experts": 3, "active": 2}},
    {"moe": {"enabled": True, "shared": True, "balance": "bias"}, "mhc": {"streams": 2}, "deltanet": {"ratio": 0.3}},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_equal_the_parameters_of_the_built_model(shape):
    config = ModelConfig.model_validate(
        {"vocab_size": 320, "dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, **shape}
    )
    with torch.device("meta"):
        model = Transformer(config)
    counts = config.count_parameters()
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())
    assert counts.matrices == sum(layer.weight.numel() for _, layer in model.ternary_layers())
    assert counts.embedding == model.embedding.weight.numel()
