"""Memory back-off: the global batch stays, the micro-batch halves."""

from functools import partial

import pytest
import torch

from nanochat_cli.errors import ConfigError
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.training.gradient_step import GradientStep, is_out_of_memory
from tests.training.synthetic import SyntheticData, tiny_config


class Limited(GradientStep):
    """Fails as the CPU allocator does for more than `limit` sequences."""

    limit = 8

    def _forward(self, inputs, targets):
        if inputs.shape[0] > self.limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return super()._forward(inputs, targets)


def gradients(tmp_path, limit):
    config = tiny_config(tmp_path, train={"batch_size": 8, "grad_accum": 1})
    torch.manual_seed(0)
    model = Transformer(config.model)
    said = []
    step = Limited(model, config.train, None, said.append)
    step.limit = limit
    step(*SyntheticData(8, 16).batch(0), partial(model.zero_grad, set_to_none=True))
    return {name: p.grad for name, p in model.named_parameters()}, step.micro_batch, said


def test_half_the_memory_gives_the_same_gradient_and_says_so(tmp_path):
    whole, _, silent = gradients(tmp_path, 8)
    halved, micro_batch, said = gradients(tmp_path, 2)
    assert micro_batch == 2
    assert silent == []
    assert len(said) == 2
    assert "8 → 4" in said[0]
    for name, gradient in whole.items():
        torch.testing.assert_close(halved[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_not_even_one_sequence_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.seq_len"):
        gradients(tmp_path, 0)


def test_other_runtime_errors_are_not_taken_for_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_the_balance_loss_counts_once_however_many_micro_batches_there_are(tmp_path):
    """With equal sequences every micro-batch has the same balance loss, and its mean is that of the whole batch."""
    found = []
    for micro_batch in (8, 2):
        moe = {"enabled": True, "experts": 4, "active": 2, "loss_weight": 1.0}
        config = tiny_config(tmp_path, train={"batch_size": micro_batch, "grad_accum": 1}, model={"moe": moe})
        torch.manual_seed(0)
        model = Transformer(config.model)
        step = GradientStep(model, config.train, None, lambda _: None)
        inputs, targets = (rows[:1].expand(8, -1) for rows in SyntheticData(8, 16).batch(0))
        step(inputs, targets, partial(model.zero_grad, set_to_none=True))
        found.append([p.grad for name, p in model.named_parameters() if "router" in name])
    assert found[0]
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-7)


def test_a_batch_that_did_not_fit_counts_the_load_of_experts_once(tmp_path):
    class LateFailure(Limited):
        def _forward(self, inputs, targets):
            part = GradientStep._forward(self, inputs, targets)
            if inputs.shape[0] > 2:  # only now: its tokens are counted already
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return part

    for kind in (LateFailure, GradientStep):
        moe = {"enabled": True, "experts": 4, "active": 2}
        config = tiny_config(tmp_path, train={"batch_size": 8, "grad_accum": 1}, model={"moe": moe})
        torch.manual_seed(0)
        model = Transformer(config.model)
        step = kind(model, config.train, None, lambda _: None)
        step(*SyntheticData(8, 16).batch(0), partial(model.zero_grad, set_to_none=True))
        for _, mixture in model.mixtures():
            assert mixture.load.sum() == 8 * 16 * 2, kind
