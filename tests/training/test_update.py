"""Memory back-off: the global batch stays, the micro-batch halves."""

import math

import pytest
import torch
from torch import Tensor

from nanochat_cli.errors import ConfigError
from nanochat_cli.optim import build
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.build import build_state
from nanochat_cli.training.next_token import next_token_loss, train_step
from nanochat_cli.training.update import gradient, is_out_of_memory
from tests.training.synthetic import SyntheticData, tiny_config


def limited(state, inputs, targets, limit, *, late=False):
    """Fails as the CPU allocator does for more than `limit` sequences; late: when their forward pass is over."""
    plain = next_token_loss(state, inputs, targets)

    def loss(rows):
        found = plain(rows) if late else None
        if rows.stop - rows.start > limit:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return found or plain(rows)

    return loss


def state_of(folder, **sections):
    config = tiny_config(folder, **({"train": {"batch_size": 8, "grad_accum": 1}} | sections))
    torch.manual_seed(0)
    return build_state(config, torch.device("cpu"), QuietReporter())


def gradients(tmp_path, limit):
    state = state_of(tmp_path)
    said = []
    state.reporter.warn = said.append
    gradient(state, 8, limited(state, *SyntheticData(8, 16).batch(0), limit))
    return {name: p.grad for name, p in state.model.named_parameters()}, state.progress.micro_batch, said


def test_half_the_memory_gives_the_same_gradient_and_says_so(tmp_path):
    whole, _, silent = gradients(tmp_path, 8)
    halved, micro_batch, said = gradients(tmp_path, 2)
    assert micro_batch == 2
    assert silent == []
    assert len(said) == 2
    assert "8 → 4" in said[0]
    for name, expected in whole.items():
        torch.testing.assert_close(halved[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_not_even_one_sequence_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.seq_len"):
        gradients(tmp_path, 0)


def test_other_runtime_errors_are_not_mistaken_for_lack_of_memory():
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_the_balance_loss_counts_once_however_many_micro_batches_there_are(tmp_path):
    """With equal sequences every micro-batch has the same balance loss, and its mean is that of the whole batch."""
    found = []
    for micro_batch in (8, 2):
        moe = {"enabled": True, "experts": 4, "active": 2, "loss_weight": 1.0}
        state = state_of(tmp_path, train={"batch_size": micro_batch, "grad_accum": 1}, model={"moe": moe})
        inputs, targets = (rows[:1].expand(8, -1) for rows in SyntheticData(8, 16).batch(0))
        gradient(state, 8, next_token_loss(state, inputs, targets))
        found.append([p.grad for name, p in state.model.named_parameters() if "router" in name])
    assert found[0]
    for whole, accumulated in zip(*found, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("limit", [2, 8])
def test_a_batch_that_did_not_fit_counts_the_load_of_experts_once(tmp_path, limit):
    state = state_of(tmp_path, model={"moe": {"enabled": True, "experts": 4, "active": 2}})
    gradient(state, 8, limited(state, *SyntheticData(8, 16).batch(0), limit, late=True))
    assert state.progress.micro_batch == limit
    for _, mixture in state.model.mixtures():
        assert mixture.load.sum() == 8 * 16 * 2


def test_a_norm_is_compared_with_its_limit_only_where_that_costs_no_wait():
    assert [build._may_exceed(torch.tensor(norm), 1.0) for norm in (0.5, 2.0, math.nan)] == [False, True, True]
    assert build._may_exceed(torch.ones((), device="meta"), 1.0), "a meta tensor has no value to read"


def test_a_step_waits_for_the_device_once(tmp_path, monkeypatch):
    """Whatever the parts measure in it: what the host reads comes in one piece."""
    state = state_of(tmp_path, mtp={"enabled": True, "n_tokens": 2})
    batch = SyntheticData(8, 16).batch(0)
    train_step(state, *batch)  # what is done once only
    monkeypatch.setattr(build, "_may_exceed", lambda *_: True)  # as on a device, whose values cost a wait
    calls = []
    for method in ("tolist", "item", "__bool__", "__int__", "__float__", "numpy"):
        original = getattr(Tensor, method)
        monkeypatch.setattr(
            Tensor, method, lambda self, *rest, _m=method, _o=original: calls.append(_m) or _o(self, *rest)
        )
    metrics = train_step(state, *batch)
    assert {"loss/main", "loss/objective", "loss/mtp_1", "loss/mtp_2", "training/grad_norm"} < metrics.keys()
    assert calls == ["tolist"]
