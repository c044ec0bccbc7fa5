"""Tiny random models whose logits vary, for the tests of inference, export and conformance."""

import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.transformer import Transformer


def tiny_config(**overrides: object) -> ModelConfig:
    values: dict[str, object] = {
        "vocab_size": 256,
        "dim": 256,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 512,
        "max_seq_len": 64,
        **overrides,
    }
    return ModelConfig.model_validate(values)


@torch.no_grad()
def spread_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model whose every parameter, norms included, is random and whose logits have a standard deviation near 1."""
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
        elif name in ("embedding.weight", "head.weight"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * config.dim**-0.5)
        else:
            row_scales = 0.5 + torch.rand(parameter.shape[0], 1, generator=generator)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * row_scales * parameter.shape[1] ** -0.5)
    model.requantize()
    return model.eval()
