"""Every combination of architectures trains, resumes bit for bit, and exports what it trained."""

import itertools

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanochat_cli.config.schema import ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export.verify import verify_gguf
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.training.health import streams
from nanochat_cli.training.methods.mtp_loss import MTPLoss
from nanochat_cli.training.trainer import Trainer
from tests.architectures import COMBINATIONS, shape
from tests.training.synthetic import SyntheticData, tiny_config
from tests.training.test_trainer import assert_same_metrics

MTP_KINDS = ["heads", "shared", "nextn"]


def trainer(config, *, resume: bool = False) -> Trainer:
    from nanochat_cli.report.reporter import QuietReporter

    data = SyntheticData(config.train.batch_size * config.train.grad_accum, config.train.seq_len)
    run_dir = config.run.dir / "tiny"
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, data, run_dir, QuietReporter(), resume=resume)


def assert_resumes(tmp_path, **sections) -> Trainer:
    """3 steps in one go and 2 + 1 give the same checkpoint and the same metrics."""
    whole = trainer(tiny_config(tmp_path / "whole", **sections))
    whole.fit()
    part = trainer(tiny_config(tmp_path / "part", **sections))
    with part.log:
        for _ in range(2):
            part._step()
            part._between_steps()
        part.save()
    trainer(tiny_config(tmp_path / "part", **sections), resume=True).fit()
    one, other = (checkpoints.load(tmp_path / name / "tiny").tensors for name in ("whole", "part"))
    assert one.keys() == other.keys()
    assert_equal_trees(one, other)
    assert_same_metrics(tmp_path / "whole" / "tiny", tmp_path / "part" / "tiny")
    return whole


def assert_equal_trees(one, other) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            assert_equal_trees(one[name], other[name])
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)


TRAIN = {"total_steps": 3, "batch_size": 2, "grad_accum": 2}


EVERY_PAIR = {
    *("plain+attention+dense+tied", "plain+attention+moe+untied", "plain+hybrid+moe+untied", "plain+hybrid+dense+tied"),
    *("mhc-2+attention+moe+tied", "mhc-2+hybrid+dense+untied", "mhc-4+attention+dense+untied", "mhc-4+hybrid+moe+tied"),
}
"""Of any two choices each pair is here; the other combinations are among the slow tests."""


def test_any_two_choices_of_an_architecture_meet_in_the_default_suite():
    def pairs(combinations):
        return {
            frozenset(two) for each in combinations for two in itertools.combinations(enumerate(each.split("+")), 2)
        }

    assert pairs(EVERY_PAIR) == pairs(COMBINATIONS)


@pytest.mark.parametrize(
    "combination", [pytest.param(c, marks=[] if c in EVERY_PAIR else [pytest.mark.slow]) for c in COMBINATIONS]
)
def test_three_steps_resume_bit_for_bit_and_export(tmp_path, combination):
    model = shape(combination, max_seq_len=16, n_heads=2, n_kv_heads=1)
    run = assert_resumes(tmp_path, model=model, train=TRAIN)
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 20, 288)
    path = tmp_path / "model.gguf"
    export_gguf(run.state.model.eval(), tokenizer, path, ExportConfig(head="f32"), {"run": "test"})
    assert verify_gguf(path, run.state.model, tokenizer, ask_llama_cpp=False).reload_difference <= 1e-4


@pytest.mark.parametrize("kind", MTP_KINDS)
@pytest.mark.parametrize("combination", ["plain+attention+dense+untied", "mhc-2+hybrid+moe+tied"])
def test_multi_token_prediction_resumes_bit_for_bit(tmp_path, combination, kind):
    model = shape(combination, max_seq_len=16, n_heads=2, n_kv_heads=1)
    run = assert_resumes(tmp_path, model=model, train=TRAIN, mtp={"enabled": True, "kind": kind, "n_tokens": 2})
    assert any(isinstance(part, MTPLoss) for part in run.state.parts)
    assert not any("mtp" in name for name in run.state.model.state_dict())


@pytest.mark.parametrize("form", [{"every": 2}, {"fade": 0.5}, {"every": 3, "fade": 1.0, "kind": "nextn"}], ids=str)
def test_cheaper_forms_of_multi_token_prediction_resume_bit_for_bit(tmp_path, form):
    model = shape("plain+attention+dense+untied", max_seq_len=16, n_heads=2, n_kv_heads=1)
    mtp = {"enabled": True, "n_tokens": 2, **form}
    run = assert_resumes(tmp_path / "form", model=model, train=TRAIN, mtp=mtp)
    plain = trainer(tiny_config(tmp_path / "plain", model=model, train=TRAIN, mtp={**mtp, "every": 1, "fade": None}))
    plain.fit()
    one, other = (t.state.model.state_dict() for t in (run, plain))
    assert not all(torch.equal(one[name], other[name]) for name in one), "the form changes what is trained"


def test_a_selection_bias_is_saved_and_moves(tmp_path):
    model = shape("plain+attention+moe+untied", max_seq_len=16)
    model["moe"] = {"enabled": True, "experts": 4, "balance": "bias"}
    run = assert_resumes(tmp_path, model=model, train=TRAIN)
    for _, moe in run.state.model.mixtures():
        assert moe.balance_bias is not None
        assert moe.balance_bias.abs().max() > 0


def test_measures_of_the_streams_go_to_tensorboard_at_their_interval(tmp_path, monkeypatch):
    assert streams.INTERVAL == 100
    monkeypatch.setattr(streams, "INTERVAL", 2)
    model = shape("mhc-2+attention+dense+untied", max_seq_len=16, n_heads=2, n_kv_heads=1)
    trainer(
        tiny_config(tmp_path, model=model, train={**TRAIN, "total_steps": 4}, telemetry={"tensorboard": True})
    ).fit()
    events = EventAccumulator(str(tmp_path / "tiny" / "tensorboard"))
    events.Reload()
    names = ("alpha", "entropy", "orthogonality", "pre_balance", "post_balance", "diversity", "composite_gain")
    for name in (*names, "gradient_norm_0", "gradient_norm_1"):
        assert [event.step for event in events.Scalars(f"mhc/{name}")] == [2, 4], name
    assert all(event.value > 0 for event in events.Scalars("mhc/gradient_norm_1"))
