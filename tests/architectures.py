"""Every combination of {plain, mHC-2, mHC-4} × {attention, hybrid} × {dense, MoE} × {tied, untied}, tiny."""

import itertools

import torch

from nanochat_cli.config.schema import ModelConfig
from nanochat_cli.model.transformer import Transformer

STREAMS = {"plain": 1, "mhc-2": 2, "mhc-4": 4}
COMBINATIONS = [
    "+".join(parts)
    for parts in itertools.product(STREAMS, ("attention", "hybrid"), ("dense", "moe"), ("tied", "untied"))
]


def shape(combination: str, **overrides: object) -> dict[str, object]:
    """The [model] section of a combination: width 256, which fits every ternary type of GGUF."""
    residual, mixing, feed_forward, head = combination.split("+")
    values: dict[str, object] = {
        "vocab_size": 288,
        "dim": 256,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 256,
        "max_seq_len": 64,
        "qk_norm": mixing == "hybrid",
        "tie_embeddings": head == "tied",
        "mhc": {"streams": STREAMS[residual]},
        "deltanet": {"pattern": "DAD"} if mixing == "hybrid" else {},
        "moe": {"enabled": feed_forward == "moe", "experts": 4, "active": 2},
    }
    return values | overrides


def build(combination: str, seed: int = 0, **overrides: object) -> Transformer:
    """A model in which no parameter has its initial value, so that nothing is the identity by accident."""
    torch.manual_seed(seed)
    model = Transformer(ModelConfig.model_validate(shape(combination, **overrides)))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim == 1 else 0.02
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
    model.requantize()
    return model.eval()
