"""Stage `hyper-connections`: residual mixing is doubly stochastic, and one stream is the plain residual."""

import torch

from nanochat_cli.config.sections.model import ModelConfig
from nanochat_cli.diagnose.validate.stage import Figure, Value, Workspace
from nanochat_cli.errors import ValidationFailure
from nanochat_cli.model.hyper_connections import (
    HyperConnection,
    collapse_streams,
    expand_streams,
    read_streams,
    write_streams,
)
from nanochat_cli.model.transformer import Transformer

SUM_TOLERANCE = 1e-6
PRODUCT_TOLERANCE = 1e-5
"""Relative to the largest value: a few float32 roundings."""
DRAWS, SPREADS = 40, (0.1, 1.0, 10.0, 100.0)
SHAPE = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 64, "max_seq_len": 32}


def hyper_connections(workspace: Workspace) -> Figure:
    """Checks row and column sums for random and extreme logits, reading and writing, and one stream bit for bit."""
    checked = [_worst_sum(streams) for streams in (2, 4)]
    worst = max(deviation for deviation, _ in checked)
    matrices = sum(count for _, count in checked)
    product = _worst_product()
    compared = _one_stream_is_the_plain_residual()
    return Figure(
        f"sums of {matrices} mixing matrices within {worst:.1e} of 1; one stream = plain residual, {compared:,} values",
        [
            Value("largest deviation of a row or column sum from 1", worst, "1"),
            Value("largest difference of reading and writing streams from their definition", product, "1"),
            Value("values equal bit for bit with one stream", compared, "values"),
        ],
    )


@torch.no_grad()
def _worst_sum(streams: int) -> tuple[float, int]:
    """Largest |sum - 1| over rows and columns, and the number of matrices checked."""
    mix = HyperConnection(_config(streams, dynamic=False), 0)
    count = len(mix.res_bias)
    generator = torch.Generator().manual_seed(streams)
    cases = [torch.randn(count, generator=generator) * spread for spread in SPREADS for _ in range(DRAWS)]
    cases += [torch.zeros(count), torch.full((count,), 1e30), torch.full((count,), -1e30)]
    cases += list(1e4 * torch.eye(count))
    x = torch.zeros(1, 1, streams, int(SHAPE["dim"]))
    worst = 0.0
    for logits in cases:
        mix.res_bias.copy_(logits)
        mixing = mix.coefficients(x).res
        deviation = max(float((mixing.sum(dim=dim) - 1).abs().max()) for dim in (-1, -2))
        if not deviation <= SUM_TOLERANCE or bool((mixing < 0).any()):
            raise ValidationFailure(
                f"a mixing matrix of {streams} streams is not doubly stochastic: a sum is {deviation:.1e} away from 1, "
                f"the smallest entry is {float(mixing.min()):.3g}"
            )
        worst = max(worst, deviation)
    return worst, len(cases)


def _worst_product() -> float:
    """Largest deviation of read_streams and write_streams from their definitions, relative to the largest value."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, 9, 4, 32, generator=generator), torch.randn(2, 9, 32, generator=generator)
    pre, post = torch.rand(2, 9, 4, generator=generator), torch.rand(2, 9, 4, generator=generator)
    mixing = torch.rand(2, 9, 4, 4, generator=generator)
    pairs = (
        (read_streams(x, pre), torch.einsum("bti,btic->btc", pre, x)),
        (
            write_streams(x, y, post, mixing),
            torch.einsum("btij,btjc->btic", mixing, x) + post.unsqueeze(-1) * y.unsqueeze(-2),
        ),
    )
    worst = max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)
    if not worst <= PRODUCT_TOLERANCE:
        raise ValidationFailure(f"reading or writing streams differs from its definition by {worst:.1e}")
    return worst


@torch.no_grad()
def _one_stream_is_the_plain_residual() -> int:
    """Compares one unit-weighted stream, and a model with one stream, with plain residuals; returns how many values."""
    generator = torch.Generator().manual_seed(8)
    x, y = torch.randn(2, 9, 32, generator=generator), torch.randn(2, 9, 32, generator=generator)
    one, streams = torch.ones(1), expand_streams(x, 1)
    written = collapse_streams(write_streams(streams, y, one, torch.ones(1, 1)))
    if not (torch.equal(read_streams(streams, one), x) and torch.equal(written, x + y)):
        raise ValidationFailure("one residual stream with weights of 1 is not the plain residual bit for bit")
    plain, single = Transformer(ModelConfig.model_validate(SHAPE)), Transformer(_config(1))
    single.load_state_dict(plain.state_dict())
    single.requantize()
    tokens = torch.randint(int(SHAPE["vocab_size"]), (2, 16), generator=generator)
    hidden = plain(tokens)
    if not torch.equal(hidden, single(tokens)):
        raise ValidationFailure("a model with one residual stream is not the model without streams bit for bit")
    return 2 * x.numel() + hidden.numel()


def _config(streams: int, **mhc: object) -> ModelConfig:
    return ModelConfig.model_validate({**SHAPE, "mhc": {"streams": streams, **mhc}})
