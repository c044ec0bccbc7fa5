"""A run that begins in float: its phases, what they equal, that it resumes in each, and what it is not yet."""

import copy
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat_cli.config.sections.export import ExportConfig
from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.diagnose.inspect.inspect_run import inspect_ternary
from nanochat_cli.engine import Engine
from nanochat_cli.errors import ConfigError, DataError
from nanochat_cli.export.huggingface import export_huggingface
from nanochat_cli.formats.open import open_run
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training.announcement import architecture
from nanochat_cli.training.methods.float_first import FloatFirst
from nanochat_cli.training.progress import Progress
from nanochat_cli.training.time_budget import CALIBRATION_STEPS
from nanochat_cli.training.trainer import Trainer
from tests.evaluation.saved_runs import save_run
from tests.training.synthetic import SyntheticData, tiny_config
from tests.training.test_trainer import assert_same_weights, trainer, weights

STEPS = 12
HALF = {"start": 0.25, "ramp": 0.25}
"""Of 12 steps: 3 in float, 3 with λ = 1/4, 2/4, 3/4, and 6 ternary ones."""
ROUNDING = {"backward": "int8", "forward": "int8"}


def config(folder, quant=HALF, train=None, **sections):
    model = {"quant": quant, "ffn_dim": 128, "dim": 128}
    return tiny_config(folder, model=model, train={"total_steps": STEPS, **(train or {})}, **sections)


def steps(run: Trainer, number: int) -> Trainer:
    for _ in range(number):
        run._step()
        run._between_steps()
    return run


shares = st.floats(0, 0.99)


@given(shares, shares, st.integers(1, 500))
def test_the_share_is_zero_then_rises_evenly_and_the_last_step_is_ternary(start, ramp, total):
    if start + ramp >= 1:
        with pytest.raises(ValueError, match="leave no step that is ternary"):
            QuantConfig(start=start, ramp=ramp)
        return
    quant = QuantConfig(start=start, ramp=ramp)
    begin, rising = (int(Fraction(share) * total + Fraction(1, 10**6)) for share in (start, ramp))
    found = [quant.ternary_share(step, total) for step in range(total)]
    assert found[:begin] == [0.0] * begin
    assert found[begin : begin + rising] == [pytest.approx((i + 1) / (rising + 1)) for i in range(rising)]
    assert found[begin + rising :] == [1.0] * (total - begin - rising)
    assert found[-1] == 1


def test_a_run_that_begins_ternary_has_no_such_part(tmp_path):
    run = trainer(config(tmp_path, quant={}))
    assert not any(type(part).__name__ == "FloatFirst" for part in run.state.parts)


@pytest.mark.parametrize("train", [{}, ROUNDING], ids=["exact", "int8"])
def test_in_float_it_trains_as_its_float_twin_bit_for_bit_and_then_differs(tmp_path, train):
    run = trainer(config(tmp_path / "run", train=train))
    twin = trainer(config(tmp_path / "twin", quant={"enabled": False}, train=train))
    with run.log, twin.log:
        for run_of in (run, twin):
            steps(run_of, 3)
        assert_same_weights(run.state.model.state_dict(), twin.state.model.state_dict())
        for run_of in (run, twin):
            steps(run_of, 1)
    assert not torch.equal(run.state.model.embedding.weight, twin.state.model.embedding.weight)


@pytest.mark.parametrize("train", [{}, ROUNDING], ids=["exact", "int8"])
def test_a_ternary_step_after_float_is_that_of_a_ternary_run_in_the_same_state(tmp_path, train):
    """The state of step 6, optimizer and all, taken on by a run that never was in float."""
    run = trainer(config(tmp_path / "run", train=train))
    ternary = trainer(config(tmp_path / "ternary", quant={}, train=train))
    with run.log, ternary.log:
        steps(run, 6)
        ternary.state.restore(copy.deepcopy(run.state.tensors()), run.state.values())
        ternary.progress.step, ternary.progress.warm_ups = 6, run.progress.warm_ups
        for run_of in (run, ternary):
            steps(run_of, 1)
    assert_same_weights(run.state.model.state_dict(), ternary.state.model.state_dict())


SLOW = pytest.mark.slow
STOPS = [({}, 4), (ROUNDING, 6), *(pytest.param({}, step, marks=SLOW) for step in (1, 3, 6, 9))]


@pytest.mark.parametrize(("train", "stop_at"), STOPS)
def test_a_run_resumed_in_any_phase_equals_the_uninterrupted_one(tmp_path, stop_at, train):
    more = {"mtp": {"enabled": True, "n_tokens": 2}}
    whole = trainer(config(tmp_path / "whole", train=train, **more))
    whole.fit()
    part = trainer(config(tmp_path / "part", train=train, **more))
    with part.log:
        steps(part, stop_at)
        part.save()
    resumed = trainer(config(tmp_path / "part", train=train, **more), resume=True)
    resumed.fit()
    assert_same_weights(weights(tmp_path / "whole" / "tiny"), weights(tmp_path / "part" / "tiny"))
    one, other = (
        [line.get("loss/main") for line in read_metrics(tmp_path / name / "tiny")] for name in ("whole", "part")
    )
    assert one == other


def test_more_steps_do_not_lead_back_to_float(tmp_path):
    trainer(config(tmp_path)).fit()
    longer = trainer(config(tmp_path, train={"total_steps": 100}), resume=True)
    with longer.log:
        steps(longer, 1)
    assert {layer.phase for layer in longer.state.linears.values()} == {"ternary"}


def test_what_a_time_budget_assumes_too_early_does_not_end_the_float_steps(tmp_path):
    """After a step that compiled it expects a run of a few steps; λ would never come back from that."""
    run = trainer(config(tmp_path, quant={"start": 0.25}, train={"total_steps": 10_000, "time_budget": 1000.0}))
    (part,) = (one for one in run.state.parts if isinstance(one, FloatFirst))
    for step in range(CALIBRATION_STEPS):
        part.before_step(Progress(total_steps=2, step=step, total_is_final=False), run.state.optimizers)
    assert part.share == 0
    for step, share in ((12, 0), (13, 1), (14, 1)):
        total = 52 if step < 14 else 100  # an estimate that grows does not take it back
        part.before_step(Progress(total_steps=total, step=step, total_is_final=False), run.state.optimizers)
        assert part.share == share


def test_evaluations_say_what_they_measure_and_only_ternary_ones_are_the_best(tmp_path, capsys):
    run_dir = tmp_path / "tiny"
    run_dir.mkdir()
    settings = config(tmp_path, eval={"interval": 2}, checkpoint={"interval": 100, "keep_best": True})
    run = Trainer(settings, SyntheticData(8, 16), run_dir, PlainReporter())
    run.fit()
    said = capsys.readouterr().err
    evaluations = [line for line in said.splitlines() if "bits per byte" in line or "bits/byte" in line]
    assert ["float weights" in line for line in evaluations[:4]] == [True, False, False, False]
    assert ["between float and ternary" in line for line in evaluations[:4]] == [False, True, True, False]
    assert "from step 4 on the layers are on the way from float to ternary" in said
    assert "from step 7 on the layers are ternary" in said
    logged = read_metrics(run_dir)
    assert [line["step"] for line in logged if "provisional/bits_per_byte" in line] == [2, 4, 6]
    assert [line["step"] for line in logged if "eval/bits_per_byte" in line] == [8, 10, 12]
    best = run.progress.best_step
    assert best is not None
    assert best > 6
    assert [line["training/ternary_share"] for line in logged if "training/ternary_share" in line] == [
        *[0] * 3, 0.25, 0.5, 0.75, *[1] * 6
    ]  # fmt: skip


def test_the_announcement_says_it(tmp_path):
    said = {"start": "float for 25% of the steps, then ternary", "ramp": "from float to ternary over 25% of the steps"}
    for key, words in said.items():
        assert words in architecture(config(tmp_path, quant={key: 0.25}))
    assert "float for 25% of the steps, then over 25% to ternary" in architecture(config(tmp_path))
    assert architecture(config(tmp_path, quant={})).endswith("64 tokens, ternary")


@pytest.fixture(params=[0.0, 0.5])
def unfinished(request, tmp_path):
    """A run whose last checkpoint is of the float phase, or half-way in the ramp, and its λ."""
    model, _ = save_run(tmp_path / "run", quant=HALF)
    described, tensors = model.config.model_dump(mode="json"), {"model": model.state_dict()}
    checkpoints.save(tmp_path / "run", 2, tensors, {"ternary_share": request.param}, model_config=described)
    return tmp_path / "run", model, request.param


def test_an_unfinished_run_is_opened_as_the_float_model_that_it_is_and_says_so(unfinished):
    folder, model, share = unfinished
    opened = open_run(folder)
    assert f"step 2, {share:.0%} of the way from float to ternary weights" in str(opened)
    assert not opened.model.config.quant.enabled
    for (_, before), (_, found) in zip(model.linears(), opened.model.linears(), strict=True):
        expected = before.weight + share * (before.ternary().dequantize() - before.weight)
        torch.testing.assert_close(found.weight, expected, rtol=0, atol=1e-7)
    assert open_run(folder, 1).ternary_share == 1  # a checkpoint without λ is ternary


def test_an_unfinished_run_is_not_exported(unfinished, tmp_path):
    folder, *_ = unfinished
    with pytest.raises(DataError, match=r"it is not exported.*nanochat train --resume"):
        Engine(QuietReporter()).export(folder, tmp_path / "model.gguf", ExportConfig())
    with pytest.raises(DataError, match="it is not exported"):
        export_huggingface(folder, tmp_path / "hf", ExportConfig(), "latest", QuietReporter())
    assert not (tmp_path / "model.gguf").exists()
    assert not (tmp_path / "hf").exists()
    with pytest.raises(ConfigError, match="it has no ternary layers yet"):
        inspect_ternary(folder, "latest", tmp_path, QuietReporter())
