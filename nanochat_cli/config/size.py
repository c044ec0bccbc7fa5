"""How many parameters a model has, from its configuration alone.

Closed form, no torch: `nanochat presets` counts every preset in milliseconds. That it equals the
model that is built is a test (tests/config/test_size.py).
"""

from dataclasses import dataclass

from nanochat_cli.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; `total` is the sum of the others."""

    embedding: int
    head: int
    """0 when the head is tied to the embedding."""
    matrices: int
    """Linear layers of the blocks: the ones that are ternary."""
    norms: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.norms


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of `Transformer(config)`, each shared tensor once."""
    dim, head_dim, ffn_dim = config.dim, config.resolved_head_dim, config.resolved_ffn_dim
    q_dim, kv_dim = config.n_heads * head_dim, config.n_kv_heads * head_dim
    attention = dim * (q_dim + 2 * kv_dim) + q_dim * dim
    feed_forward = 3 * dim * ffn_dim
    block_norms = 2 * dim
    if config.qk_norm:
        block_norms += 2 * head_dim
    if config.sub_norm:
        block_norms += q_dim + ffn_dim
    return ParameterCounts(
        embedding=config.vocab_size * dim,
        head=0 if config.tie_embeddings else config.vocab_size * dim,
        matrices=config.n_layers * (attention + feed_forward),
        norms=config.n_layers * block_norms + dim,
    )


def format_parameters(count: int) -> str:
    """`121_930_000` -> `"121.9M"`: three or four significant digits, decimal multiples."""
    for factor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            value = count / factor
            return f"{value:.2f}{suffix}" if value < 10 else f"{value:.1f}{suffix}"
    return str(count)


def parse_parameters(label: str) -> float:
    """`"125M"` -> `125e6`. Raises ValueError on anything else."""
    factors = {"K": 1e3, "M": 1e6, "B": 1e9}
    return float(label[:-1]) * factors[label[-1]] if label[-1:] in factors else float(label)
