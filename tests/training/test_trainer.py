"""The training loop: it learns, it resumes bit for bit, it skips, it stops when asked."""

import itertools
import json
import os
import signal
import time

import pytest
import torch

from nanochat_cli.errors import Diverged, Interrupted, NanochatError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training import update
from nanochat_cli.training.trainer import Trainer
from tests.training.gradients import gradient_of
from tests.training.synthetic import SyntheticData, tiny_config

TIMINGS = ("seconds", "throughput/")


def trainer(config, *, resume=False):
    data = SyntheticData(config.train.batch_size * config.train.grad_accum, config.train.seq_len)
    run_dir = config.run.dir / "tiny"
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, data, run_dir, QuietReporter(), resume=resume)


def weights(run_dir):
    return checkpoints.load(run_dir).tensors["model"]


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_the_model_learns_the_synthetic_language(tmp_path):
    config = tiny_config(tmp_path, train={"total_steps": 150}, optim={"warmup_steps": 10}, eval={"interval": 1000})
    result = trainer(config).fit()
    assert result.held_out.accuracy > 0.6  # chance is 1/64; the first token of a stride cannot be known
    assert result.progress.step == 150
    assert result.skipped == 0


@pytest.mark.parametrize("stop_at", [1, 5, 8, 11])
def test_a_run_resumed_after_any_step_equals_the_uninterrupted_one(tmp_path, stop_at):
    whole = trainer(tiny_config(tmp_path / "whole"))
    whole.fit()
    part = trainer(tiny_config(tmp_path / "part"))
    with part.log:
        for _ in range(stop_at):
            part._step()
            part._between_steps()
        part.save()
    resumed = trainer(tiny_config(tmp_path / "part"), resume=True)
    assert resumed.progress.step == stop_at
    resumed.fit()
    assert_same_weights(weights(tmp_path / "whole" / "tiny"), weights(tmp_path / "part" / "tiny"))
    assert_same_metrics(tmp_path / "whole" / "tiny", tmp_path / "part" / "tiny")


def assert_same_metrics(one, other):
    def untimed(run):
        return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in read_metrics(run)]

    assert untimed(one) == untimed(other)


def test_the_resumed_run_reads_only_the_batches_that_are_left(tmp_path):
    first = trainer(tiny_config(tmp_path))
    with first.log:
        for _ in range(7):
            first._step()
        first.save()
    resumed = trainer(tiny_config(tmp_path), resume=True)
    resumed.fit()
    assert resumed.data.read == list(range(7, 12))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch):
    run = trainer(tiny_config(tmp_path))
    gradient = update.gradient
    before = {name: p.clone() for name, p in run.state.model.named_parameters()}

    def poisoned(state, rows, loss):
        metrics = gradient(state, rows, loss)
        next(state.model.parameters()).grad[0, 0] = float("nan")
        return metrics

    monkeypatch.setattr(update, "gradient", poisoned)
    with run.log:
        run._step()
    assert run.state.skip_policy.skipped == 1
    for name, parameter in run.state.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_too_many_skipped_steps_end_the_run_naming_the_last_good_checkpoint(tmp_path):
    run = trainer(tiny_config(tmp_path, train={"max_skipped_steps": 3}))
    for _ in range(4):
        run._step()
        run._between_steps()
    with torch.no_grad():
        run.state.model.embedding.weight.fill_(float("nan"))
    with pytest.raises(NanochatError, match="step 4"):
        run.fit()


def test_a_run_whose_norms_rise_for_good_continues(tmp_path):
    run = trainer(tiny_config(tmp_path, train={"total_steps": 60, "max_skipped_steps": 10}))
    clip = run.state.optimizers.clip_grad_norm
    run.state.optimizers.clip_grad_norm = lambda limit: clip(limit) * (100 if run.progress.step >= 30 else 1)
    result = run.fit()
    assert result.progress.step == 60
    assert result.skipped == 3


def poison(run, at):
    """After step `at` every loss is NaN."""
    step = run._step

    def poisoned():
        step()
        if run.progress.step == at:
            with torch.no_grad():
                run.state.model.embedding.weight.fill_(float("nan"))

    run._step = poisoned


def test_a_checkpoint_saved_while_steps_are_skipped_is_not_good_and_replaces_no_good_one(tmp_path):
    sections = {"train": {"max_skipped_steps": 6}, "checkpoint": {"interval": 2, "keep_last": 1, "keep_best": False}}
    run = trainer(tiny_config(tmp_path, **sections))
    poison(run, 5)
    with pytest.raises(NanochatError, match="the last good checkpoint is step 4;"):
        run.fit()
    assert checkpoints.steps(tmp_path / "tiny") == [4]
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "tiny").values() if tensor.is_floating_point())


def test_a_run_that_is_stopped_while_it_skips_still_knows_its_last_good_checkpoint(tmp_path):
    sections = {"train": {"max_skipped_steps": 6}, "checkpoint": {"interval": 2, "keep_last": 1, "keep_best": False}}
    run = trainer(tiny_config(tmp_path, **sections))
    poison(run, 5)
    with run.log:
        for _ in range(8):
            run._step()
            run._between_steps()
        run.save()
    assert checkpoints.steps(tmp_path / "tiny") == [4, 8]
    with pytest.raises(NanochatError, match="the last good checkpoint is step 4;"):
        trainer(tiny_config(tmp_path, **sections), resume=True).fit()


def test_a_run_that_is_not_finite_in_its_last_steps_ends_as_diverged(tmp_path):
    run = trainer(tiny_config(tmp_path))
    poison(run, 10)
    with pytest.raises(Diverged, match="the held-out loss is nan; the last good checkpoint is step 8;"):
        run.fit()
    assert checkpoints.latest_step(tmp_path / "tiny") == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_everything_and_ends_with_exit_code_130(tmp_path, number, capsys):
    run = trainer(tiny_config(tmp_path))
    run.view._reporter = PlainReporter()
    step = run._step

    def signalled():
        step()
        if run.progress.step == 6:
            os.kill(os.getpid(), number)
            said = capsys.readouterr().err
            assert f"{number.name}: stopping after what is being done now" in said
            assert "loses what came after step 5" in said

    run._step = signalled
    with pytest.raises(Interrupted, match="--resume") as caught:
        run.fit()
    assert caught.value.exit_code == 130
    assert checkpoints.latest_step(tmp_path / "tiny") == 6
    trainer(tiny_config(tmp_path), resume=True).fit()
    trainer(tiny_config(tmp_path / "whole")).fit()
    assert_same_weights(weights(tmp_path / "tiny"), weights(tmp_path / "whole" / "tiny"))


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path):
    config = tiny_config(tmp_path, checkpoint={"interval": 2, "keep_last": 2}, eval={"interval": 4})
    trainer(config).fit()
    kept = checkpoints.steps(tmp_path / "tiny")
    best = min(
        (line for line in read_metrics(tmp_path / "tiny") if "eval/bits_per_byte" in line),
        key=lambda line: line["eval/bits_per_byte"],
    )
    assert set(kept) == {10, 12} | {best["step"]}
    assert checkpoints.load(tmp_path / "tiny", "best").step == best["step"]


def test_accumulation_over_micro_batches_gives_the_gradient_of_the_whole_batch(tmp_path):
    gradients = []
    for batch_size, accum in ((8, 1), (2, 4), (1, 8)):
        name = tmp_path / f"{batch_size}"
        run = trainer(tiny_config(name, train={"batch_size": batch_size, "grad_accum": accum}))
        gradient_of(run.state, *run.data.batch(0))
        gradients.append({n: p.grad for n, p in run.state.model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_time_budget_bounds_the_steps_and_freezes_before_the_decay(tmp_path, monkeypatch):
    clock = itertools.count(step=0.01)
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    config = tiny_config(
        tmp_path,
        train={"total_steps": 100_000, "time_budget": 1.5},
        optim={"warmup_steps": 4, "stable_ratio": 0.4},
        eval={"interval": 100_000},
        checkpoint={"interval": 100_000},
    )
    result = trainer(config).fit()
    assert result.progress.total_is_final
    assert result.progress.step == result.progress.total_steps < 100_000
    rates = [line["training/lr"] for line in read_metrics(tmp_path / "tiny") if "training/lr" in line]
    assert rates[-1] < 0.1 * max(rates)  # the decay reached its end


def test_metrics_hold_losses_rates_evaluations_and_ternary_statistics(tmp_path):
    trainer(tiny_config(tmp_path)).fit()
    names = {name for line in read_metrics(tmp_path / "tiny") for name in line}
    assert {
        "loss/main",
        "training/lr",
        "training/grad_norm",
        "throughput/tokens_per_second",
        "throughput/utilisation",
        "throughput/data_wait_ms",
        "eval/loss",
        "eval/perplexity",
        "eval/accuracy",
        "eval/bits_per_byte",
        "ternary/flip_rate",
        "ternary/zero_fraction",
    } <= names
    json.dumps(read_metrics(tmp_path / "tiny"), allow_nan=False)


def test_compiled_and_eager_training_agree(tmp_path):
    losses = []
    for setting in ("off", "on"):
        run = trainer(
            tiny_config(tmp_path / setting, model={"n_layers": 1}, train={"compile": setting, "total_steps": 4})
        )
        run.fit()
        losses.append([line["loss/main"] for line in read_metrics(tmp_path / setting / "tiny") if "loss/main" in line])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
