"""The formula equals what torch counts while a real model runs forward and backward."""

import math
from dataclasses import replace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanochat_cli.config.schema import Config, ModelConfig
from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.model.mtp import build_mtp
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.flops import measured_peak, model_flops_per_token, training_flops_per_token
from nanochat_cli.training.losses import TokenLoss
from nanochat_cli.training.methods.collider import TokenFilter
from tests.training.gradients import gradient_of, setup_of, state_of


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
    # Causal attention needs half of the square: the counter sees twice what the formula adds.
    attention = model_flops_per_token(model_config, seq_len) - model_flops_per_token(model_config, 0)
    expected = (model_flops_per_token(model_config, seq_len) + attention) * batch_size * seq_len
    assert counter.get_total_flops() == expected


def test_a_known_shape_by_hand() -> None:
    model_config = config(n_layers=1, n_heads=2, n_kv_heads=1, dim=8, head_dim=4, ffn_dim=16, vocab_size=10)
    # wq 8·8, wk and wv 8·4, wo 8·8, gate, up and down 8·16, head 8·10; QKᵀ and PV over 5 of 10 keys
    assert model_flops_per_token(model_config, 10) == 6 * (64 + 64 + 64 + 3 * 128 + 80) + 3 * (2 * 2 * 5 * 2 * 4)


class InsideOwnOperations(TorchDispatchMode):
    """Runs our operators as plain functions, so that a counter sees the products inside."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nanochat":
            with self:
                return OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


MTP_KINDS = {
    "heads": {"enabled": True, "kind": "heads", "n_tokens": 2},
    "heads of some": {"enabled": True, "kind": "heads", "n_tokens": 2, "every": 4},
    "shared": {"enabled": True, "kind": "shared", "n_tokens": 3},
    "nextn": {"enabled": True, "kind": "nextn"},
    "off": {},
}


@pytest.mark.parametrize("filtering", [False, True])
@pytest.mark.parametrize("kind", MTP_KINDS)
def test_a_training_step_takes_what_torch_counts_with_tokens_ahead_and_with_filtering(kind, filtering):
    seq_len, rows = 16, 4
    shape = config(max_seq_len=seq_len).model_dump()
    whole = Config.model_validate(
        {
            "model": shape,
            "mtp": MTP_KINDS[kind],
            "collider": {"enabled": filtering, "sparsity": 0.25},
            "train": {"seq_len": seq_len, "batch_size": rows, "loss_chunk": 1000},
        }
    )
    torch.manual_seed(0)
    model, mtp = Transformer(whole.model), build_mtp(whole.model, whole.mtp)
    setup = replace(setup_of(model, mtp), config=whole, score=TokenLoss.of(model, whole.train))
    state = state_of(setup, *([TokenFilter(setup)] if filtering else []))
    tokens = torch.randint(0, 96, (rows, seq_len + 1))
    # torch does not count this product, which is added in place.
    counted = {torch.ops.aten.addmm_: lambda _, left, right, **__: 2 * left[0] * left[1] * right[1]}
    counter = FlopCounterMode(display=False, custom_mapping=counted)
    with sdpa_kernel(SDPBackend.MATH), counter, InsideOwnOperations():
        gradient_of(state, tokens[:, :-1], tokens[:, 1:])
    # Without attention, of which the counter sees the whole square: see above.
    attention = model_flops_per_token(whole.model, seq_len) - model_flops_per_token(whole.model, 0)
    layers = 4 / 3 if kind == "nextn" else 1
    kept = 0.75 if filtering else 1.0
    expected = training_flops_per_token(whole, kept) - layers * attention * (1 + 2 * kept) / 3 + 2 * layers * attention
    assert counter.get_total_flops() == pytest.approx(expected * rows * seq_len)


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
