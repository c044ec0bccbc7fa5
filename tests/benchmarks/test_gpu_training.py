"""The training section of `benchmarks/gpu.py`, on the CPU with a model of a few thousand weights."""

import pytest
import torch

from benchmarks.gpu_training import KINDS, billion, byte_batches, measure_training, train_forms
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config
from nanochat_cli.model.transformer import Transformer

CPU = torch.device("cpu")


@pytest.fixture
def tiny() -> Config:
    model = {"vocab_size": 256, "dim": 128, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 128}
    return Config.model_validate({"model": {**model, "max_seq_len": 32}, "train": {"batch_size": 2, "seq_len": 16}})


def test_every_form_is_timed_against_the_float_twin(tiny):
    results = measure_training("tiny", tiny, CPU, rounds=1, steps=1)
    rates = [result for result in results if result.metric == "training rate"]
    assert [result.case.split(": ")[1] for result in rates] == list(KINDS)
    assert [result.peer for result in rates] == [None, "float linears", "float linears"]
    assert all(result.value > 0 for result in results)


def test_the_two_forms_of_the_ternary_product_train_alike_and_learn(tiny):
    results, curves = train_forms(tiny, CPU, steps=40)
    assert len(results) == len(KINDS)
    torch.testing.assert_close(curves["int8 form"], curves["float form"], rtol=1e-4, atol=1e-4)
    assert all(sum(curve[-5:]) < sum(curve[:5]) for curve in curves.values())
    assert curves["float form"] != curves["float linears"]


def test_the_bytes_are_the_same_every_time_and_repeat_when_they_run_out(tiny):
    assert torch.equal(byte_batches(tiny, 3), byte_batches(tiny, 3))
    assert byte_batches(tiny, 3).shape == (3, 2, 17)
    assert byte_batches(tiny, 3).max() < 256


def test_the_large_shape_has_a_billion_parameters():
    with torch.device("meta"):
        model = Transformer(billion(resolve_config(["nano-125m", "llama-cpp"])).model)
    assert 0.95e9 < sum(p.numel() for p in model.parameters()) < 1.05e9
