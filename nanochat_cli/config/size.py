"""How many parameters a model has, from its configuration alone.

A closed form without torch, so that `nanochat presets` counts every preset in milliseconds. A test compares it with
the model as built (tests/config/test_size.py).
"""

from dataclasses import dataclass
from math import factorial

from nanochat_cli.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; `total` is the sum of the others."""

    embedding: int
    head: int
    """0 if the head is tied to the embedding."""
    attention: int
    deltanet: int
    """Projections of the DeltaNet layers."""
    feed_forward: int
    """Dense feed-forwards, or all experts."""
    router: int
    other: int
    """What DeltaNet layers have besides ternary projections: gates, convolution, decay."""
    hyper_connections: int
    norms: int
    inactive: int
    """The part of feed_forward that a token does not use: the experts that were not chosen."""

    @property
    def matrices(self) -> int:
        """Linear layers of the blocks, which are ternary."""
        return self.attention + self.deltanet + self.feed_forward

    @property
    def total(self) -> int:
        small = self.router + self.other + self.hyper_connections + self.norms
        return self.embedding + self.head + self.matrices + small

    @property
    def active(self) -> int:
        """Parameters that one token uses."""
        return self.total - self.inactive


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Count the parameters of `Transformer(config)`, each shared tensor once."""
    dim, head_dim, ffn_dim = config.dim, config.resolved_head_dim, config.resolved_ffn_dim
    n_layers, n_delta = config.n_layers, sum(config.delta_layers)
    n_attention = n_layers - n_delta
    q_dim, kv_dim = config.n_heads * head_dim, config.n_kv_heads * head_dim
    gated = 2 if config.resolved_attention_gate else 1
    attention = dim * (gated * q_dim + 2 * kv_dim) + q_dim * dim
    attention_norms = 2 * head_dim * config.qk_norm + q_dim * config.sub_norm
    heads, inner = config.delta_heads, config.delta_heads * config.delta_head_dim
    delta_other = 2 * dim * heads + 3 * inner * config.deltanet.conv_kernel + 2 * heads
    expert = 3 * dim * ffn_dim
    moe = config.moe
    experts = moe.experts + moe.shared if moe.enabled else 1
    norms = dim + n_layers * (2 * dim + ffn_dim * config.sub_norm)
    norms += n_attention * attention_norms + n_delta * config.delta_head_dim
    return ParameterCounts(
        embedding=config.vocab_size * dim,
        head=0 if config.tie_embeddings else config.vocab_size * dim,
        attention=n_attention * attention,
        deltanet=n_delta * 5 * dim * inner,
        feed_forward=n_layers * experts * expert,
        router=n_layers * dim * moe.experts * moe.enabled,
        other=n_delta * delta_other,
        hyper_connections=2 * n_layers * _hyper_connection(config),
        norms=norms,
        inactive=n_layers * (moe.experts - moe.active) * expert if moe.enabled else 0,
    )


def _hyper_connection(config: ModelConfig) -> int:
    n, mhc = config.mhc.streams, config.mhc
    if n == 1:
        return 0
    outputs = 2 * n + factorial(n)
    return outputs + (outputs * n * config.dim + 3 if mhc.dynamic else 0)


def format_parameters(count: int) -> str:
    """`121_930_000` -> `"121.9M"`: three or four significant digits, decimal multiples."""
    for factor, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= factor:
            value = count / factor
            return f"{value:.2f}{suffix}" if value < 10 else f"{value:.1f}{suffix}"
    return str(count)
