"""The formula equals what torch counts while a real model runs forward and backward."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanochat_cli.config.schema import ModelConfig, QuantConfig
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.flops import measured_peak, model_flops_per_token


def config(**changes: object) -> ModelConfig:
    shape: dict[str, object] = {
        "vocab_size": 96,
        "dim": 32,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "ffn_dim": 48,
    }
    return ModelConfig.model_validate(shape | {"max_seq_len": 64, "quant": QuantConfig(enabled=False)} | changes)


@pytest.mark.parametrize(
    ("model_config", "batch_size", "seq_len"),
    [
        (config(), 1, 64),
        (config(tie_embeddings=True), 3, 17),
        (config(head_dim=16, n_kv_heads=4), 2, 32),
        (config(head_dim=20, n_kv_heads=1, n_layers=1, qk_norm=True), 2, 8),
        (config(quant=QuantConfig(enabled=True), sub_norm=True), 2, 16),
    ],
)
def test_formula_equals_the_flops_torch_counts(model_config: ModelConfig, batch_size: int, seq_len: int) -> None:
    torch.manual_seed(0)
    model = Transformer(model_config)
    tokens = torch.randint(0, model_config.vocab_size, (batch_size, seq_len))
    # The math backend is made of matmuls that are counted one by one, over the full T × T square.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)).sum().backward()
    # Of the square, causal attention needs half: what the formula adds once, the counter sees twice.
    attention = model_flops_per_token(model_config, seq_len) - model_flops_per_token(model_config, 0)
    expected = (model_flops_per_token(model_config, seq_len) + attention) * batch_size * seq_len
    assert counter.get_total_flops() == expected


def test_a_known_shape_by_hand() -> None:
    model_config = config(n_layers=1, n_heads=2, n_kv_heads=1, dim=8, head_dim=4, ffn_dim=16, vocab_size=10)
    # wq 8·8, wk and wv 8·4, wo 8·8, gate, up and down 8·16, head 8·10; QKᵀ and PV over 5 of 10 keys
    assert model_flops_per_token(model_config, 10) == 6 * (64 + 64 + 64 + 3 * 128 + 80) + 3 * (2 * 2 * 5 * 2 * 4)


def test_the_peak_is_a_rate_that_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = measured_peak(torch.device("cpu"), torch.float32, sizes=(64, 128))
    assert math.isfinite(first)
    assert first > 0

    def no_second_measurement(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(torch, "mm", no_second_measurement)
    assert measured_peak(torch.device("cpu"), torch.float32) == first
    with pytest.raises(AssertionError, match="measured again"):
        measured_peak(torch.device("cpu"), torch.float64)


def test_the_peak_divides_the_work_of_the_matmul_by_the_shortest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0, 30.0, 39.0])
    monkeypatch.setattr("nanochat_cli.training.flops._peaks", {})
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    assert measured_peak(torch.device("cpu"), torch.float32, sizes=(10,)) == 2 * 10**3 / 2.0
