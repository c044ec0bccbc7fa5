"""FIRE in a run: when it happens, what it changes, and that a resumed run equals the uninterrupted one."""

import math

import pytest
import torch

from nanochat_cli.config.schema import FireConfig
from nanochat_cli.diagnose.inspect.isometry import measure_isometry
from nanochat_cli.diagnose.inspect.plots import plot_isometry
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim.fire import deviation_from_isometry
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.health.dormant import dormant_fraction
from nanochat_cli.training.methods.fire import Fire, rewarm_factor, stacked
from nanochat_cli.training.trainer import Trainer
from tests.architectures import build
from tests.training.synthetic import SyntheticData, tiny_config

TIMINGS = ("seconds", "throughput/")
TOKENS = torch.randint(288, (2, 17), generator=torch.Generator().manual_seed(0))


def make_trainer(config, *, resume=False, reporter=None) -> Trainer:
    data = SyntheticData(config.train.batch_size * config.train.grad_accum, config.train.seq_len)
    run_dir = config.run.dir / "tiny"
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, data, run_dir, reporter or QuietReporter(), resume=resume)


def train_until(trainer: Trainer, steps: int) -> None:
    """Train like `fit`, then as if killed: what was not saved is lost."""
    with trainer.log:
        while trainer.progress.step < steps:
            trainer._step()
            trainer._between_steps()


def fire_lines(run_dir, key="fire/sfe"):
    return [line for line in read_metrics(run_dir) if key in line]


def untimed(run_dir):
    return [{k: v for k, v in line.items() if not k.startswith(TIMINGS)} for line in read_metrics(run_dir)]


def assert_same_run(one, other):
    ours, theirs = (checkpoints.load(run / "tiny").tensors for run in (one, other))
    for part in ("model", "optimizer"):
        left, right = flat(ours[part]), flat(theirs[part])
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name], right[name]), name
    assert untimed(one / "tiny") == untimed(other / "tiny")


def flat(tree, prefix=""):
    if isinstance(tree, torch.Tensor):
        return {prefix: tree}
    return {k: v for name, part in tree.items() for k, v in flat(part, f"{prefix}/{name}").items()}


def test_the_learning_rate_climbs_again_as_a_pure_function_of_the_steps_since():
    assert [rewarm_factor(step, 10, 4) for step in (10, 11, 12, 13, 14, 99)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rewarm_factor(7, None, 4) == 1
    assert rewarm_factor(10, 10, 0) == 1


@pytest.mark.parametrize("combination", ["plain+attention+moe+untied"])
def test_an_event_changes_the_block_matrices_and_nothing_else(combination, tmp_path):
    fire = {"enabled": True, "steps": [1], "rewarm_steps": 4, "scale": "paper"}
    model = build(combination).config.model_dump(mode="json") | {"max_seq_len": 16, "vocab_size": 64}
    config = tiny_config(tmp_path, model=model, fire=fire)
    trainer = make_trainer(config)
    train_until(trainer, 1)
    model, optimizers = trainer.state.model, trainer.state.optimizers
    (part,) = (part for part in trainer.state.parts if isinstance(part, Fire))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert part.before_step(trainer.progress, optimizers)
    chosen = {f"{name}.weight" for name, _ in model.linears()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen), name
    for name, layer in model.linears():
        matrices = stacked(layer)
        rows, columns = matrices.shape[1:]
        assert (deviation_from_isometry(matrices / math.sqrt(rows / columns)) <= 1e-6).all(), name
        fresh = layer.operand.clone(), layer.scales.clone()
        layer.requantize()
        assert torch.equal(fresh[0], layer.operand)
        assert torch.equal(fresh[1], layer.scales)
    states = {n: s for group in optimizers.state_dict().values() for n, s in group.items()}
    assert all(not t.any() for name in chosen for t in states[name].values())
    assert any(t.any() for name in states.keys() - chosen for t in states[name].values())
    assert optimizers.lr_factor == 0.25


@pytest.mark.parametrize("stop_at", [4, 5])
def test_a_run_killed_around_an_event_resumes_bit_for_bit_with_its_telemetry(tmp_path, stop_at):
    fire = {"enabled": True, "steps": [4, 6], "rewarm_steps": 3}
    make_trainer(tiny_config(tmp_path / "whole", fire=fire)).fit()
    part = make_trainer(tiny_config(tmp_path / "part", fire=fire, checkpoint={"interval": stop_at}))
    train_until(part, min(stop_at + 2, 11))  # beyond the checkpoint: these steps are lost
    make_trainer(tiny_config(tmp_path / "part", fire=fire, checkpoint={"interval": 4}), resume=True).fit()
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    events = fire_lines(tmp_path / "part" / "tiny")
    assert [line["step"] for line in events] == [5, 7]  # before the step that logs it
    for line in events:
        assert line["fire/dfi_after"] <= 1e-6
        assert line["fire/matrices"] == 14
        assert line["fire/sfe/blocks.0.attention.wq"] > 0
    rates = {
        line["step"]: line["training/lr"] for line in read_metrics(tmp_path / "part" / "tiny") if "training/lr" in line
    }
    assert rates[5] == pytest.approx(rates[4] / 3, rel=0.2)  # the schedule itself moves a little


def test_a_finished_run_continues_with_fire_at_the_step_where_it_stopped(tmp_path):
    make_trainer(tiny_config(tmp_path)).fit()
    fire = {"enabled": True, "steps": [12], "rewarm_steps": 2}
    config = tiny_config(tmp_path, train={"total_steps": 15}, fire=fire)
    train_until(make_trainer(config, resume=True), 14)  # killed before it saved
    make_trainer(config, resume=True).fit()
    assert [line["step"] for line in fire_lines(tmp_path / "tiny")] == [13]


def test_other_data_on_resume_is_a_phase_and_the_same_data_is_not(tmp_path):
    fire = {"enabled": True, "trigger": "phase"}
    make_trainer(tiny_config(tmp_path, data={"path": str(tmp_path / "python")})).fit()

    def go_on(data, total_steps):
        config = tiny_config(
            tmp_path, data={"path": str(tmp_path / data)}, train={"total_steps": total_steps}, fire=fire
        )
        make_trainer(config, resume=True).fit()
        return [line["step"] for line in fire_lines(tmp_path / "tiny")]

    assert go_on("python", 14) == []
    assert go_on("rust", 16) == [15]
    assert go_on("rust", 18) == [15]
    assert go_on("python", 20) == [15, 19]


def test_the_measured_triggers_fire_at_their_bound_and_are_logged(tmp_path):
    low = {"enabled": True, "trigger": "isometry", "interval": 4, "isometry_deviation": 0.01}
    slow = {"lr": 0.002, "warmup_steps": 2}
    make_trainer(tiny_config(tmp_path / "low", fire=low, optim=slow)).fit()
    assert [line["step"] for line in fire_lines(tmp_path / "low" / "tiny")] == [5]  # at 8 they still are isometries
    make_trainer(tiny_config(tmp_path / "high", fire=low | {"isometry_deviation": 1e3})).fit()
    assert not fire_lines(tmp_path / "high" / "tiny")
    measured = fire_lines(tmp_path / "high" / "tiny", "fire/deviation")
    assert [line["step"] for line in measured] == [5, 9]
    assert measured[0]["fire/deviation"] == pytest.approx(1, abs=0.5)  # still close to its random start
    dormant = {"enabled": True, "trigger": "dormant", "interval": 4, "dormant_threshold": 1.0}
    make_trainer(tiny_config(tmp_path / "dormant", fire=dormant)).fit()
    assert [line["step"] for line in fire_lines(tmp_path / "dormant" / "tiny")] == [5, 9]


@pytest.mark.parametrize("combination", ["plain+attention+dense+untied", "plain+attention+moe+untied"])
def test_dormant_units_are_counted_and_the_model_is_left_as_it_was(combination):
    model = build(combination).train()
    random = torch.get_rng_state()
    assert dormant_fraction(model, TOKENS, 0.0) == 0
    assert dormant_fraction(model, TOKENS, 1e9) == 1
    feed_forward = [module for module in model.modules() if hasattr(module, "w_up")]
    rows = feed_forward[0].w_up.weight
    killed = len(rows) // 4
    rows.data[:killed] = 0  # the first layer's units; of a mixture, those of the first expert
    model.requantize()
    units = sum(len(module.w_up.weight) for module in feed_forward)
    assert dormant_fraction(model, TOKENS, 0.0) == pytest.approx(killed / units, abs=1e-6)
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(moe.load.any() for _, moe in model.mixtures())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_pattern_that_names_no_layer_and_a_trigger_without_steps_are_refused(tmp_path):
    config = tiny_config(tmp_path, fire={"enabled": True, "steps": [3], "layers": ["*.wz"]})
    with pytest.raises(ConfigError, match=r"fire.layers = '\*.wz'"):
        make_trainer(config)
    with pytest.raises(ValueError, match="needs fire"):
        FireConfig(enabled=True)


def test_only_the_named_layers_change(tmp_path):
    fire = {"enabled": True, "steps": [2], "layers": ["*.wq", "*.wk"]}
    make_trainer(tiny_config(tmp_path, train={"total_steps": 3}, fire=fire)).fit()
    (line,) = fire_lines(tmp_path / "tiny")
    assert line["fire/matrices"] == 4


def test_a_model_is_measured_for_inspection_with_known_values(tmp_path):
    isometry = torch.linalg.qr(torch.randn(24, 8, generator=torch.Generator().manual_seed(0))).Q
    lopsided = torch.diag(torch.tensor([2.0, 1.0]))
    layers = measure_isometry([("i", 3 * isometry[None]), ("l", torch.stack([lopsided, torch.zeros(2, 2)]))])
    assert [layer.name for layer in layers] == ["i", "l#0", "l#1"]
    assert layers[0].deviation == pytest.approx(0, abs=1e-6)
    assert layers[0].condition == pytest.approx(1, rel=1e-5)
    assert layers[0].spectral_norm == pytest.approx(3, rel=1e-5)
    assert layers[1].deviation == pytest.approx(2 * 17 / 25 - 1)
    assert layers[1].condition == pytest.approx(2)
    assert layers[2].warnings() == ["all zeros"]
    model: Transformer = build("plain+attention+moe+untied")
    measured = measure_isometry((name, stacked(layer)) for name, layer in model.linears())
    assert all(layer.against_random == pytest.approx(1, abs=0.5) for layer in measured)
    assert plot_isometry([*layers, *measured], tmp_path / "isometry.png").stat().st_size > 1000
