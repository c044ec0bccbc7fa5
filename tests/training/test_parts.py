"""Methods as parts: what is off does not exist, and the training loop knows none of them by name."""

import inspect
import re

import pytest
import torch

from nanochat_cli.formats.run import checkpoints, state_tree
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training import build, next_token, part, state, trainer, update
from nanochat_cli.training.build import METHODS, build_state
from nanochat_cli.training.methods import distillation
from nanochat_cli.training.part import MicroBatch, Part
from nanochat_cli.training.trainer import Trainer
from tests.training.gradients import gradient_of
from tests.training.synthetic import SyntheticData, tiny_config

FLOAT = {"model": {"quant": {"enabled": False}}}
ON = {
    "Distillation": {"distill": {"teacher": "somewhere"}},
    "MTPLoss": {"mtp": {"enabled": True, "n_tokens": 2}},
    "FloatFirst": {"model": {"quant": {"start": 0.5}}},
    "BigramStart": {"bigram_init": {"steps": 2}},
    "Fire": {"fire": {"enabled": True, "steps": [1]}},
    "TokenFilter": {"collider": {"enabled": True}},
    "ExpertBalance": {"model": {"quant": {"enabled": False}, "moe": {"enabled": True, "experts": 4}}},
    "TernaryHealth": {"model": {}},
    "StreamHealth": {"model": {"quant": {"enabled": False}, "mhc": {"streams": 2}}},
}
SAVED = {
    "MTPLoss": {"mtp"},
    "FloatFirst": {"ternary_share", "telemetry"},
    "Fire": {"fire"},
    "ExpertBalance": {"expert_load"},
    "TernaryHealth": {"telemetry"},
}
"""What a checkpoint holds of a part: the names of its files, and of its keys in state.json."""
BESIDE = {"FloatFirst": ["TernaryHealth"]}
"""What goes with a part, since the layers are ternary."""


def make(folder, **sections) -> Trainer:
    config = tiny_config(folder, **sections)
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    return Trainer(config, SyntheticData(8, 16), folder / "tiny", QuietReporter())


def names(run: Trainer) -> list[str]:
    return [type(one).__name__ for one in run.state.parts]


def saved(run: Trainer) -> set[str]:
    with run.log:
        run.save()
    checkpoint = checkpoints.load(run.run_dir)
    return {*checkpoint.tensors, *checkpoint.state} - {"model", "optimizer", "random"} - {
        "progress", "skip_policy", "data", "config"
    }  # fmt: skip


def test_a_run_without_methods_builds_and_saves_nothing_of_them(tmp_path):
    run = make(tmp_path, **FLOAT)
    assert names(run) == []
    assert saved(run) == set()


@pytest.mark.parametrize("name", ON)
def test_a_method_that_is_on_is_the_one_part_and_saves_its_own_state(tmp_path, name, monkeypatch):
    monkeypatch.setattr(distillation, "load_teacher", lambda config: Transformer(config.model))
    run = make(tmp_path, **(FLOAT | ON[name]))
    assert names(run) == [name, *BESIDE.get(name, [])]
    assert saved(run) == SAVED.get(name, set())


def test_every_method_is_tested_here():
    assert {method.__name__ for method in METHODS} == ON.keys()


@pytest.mark.parametrize("module", [trainer, update, next_token, state, part, checkpoints, state_tree])
def test_the_loop_the_update_and_the_checkpoints_name_no_method(module):
    words = r"collider|\bfire\b|mtp|multi-token|bigram|\bmoe|mixture|expert|balance|streams|mhc|ternary|dormant|kept_f"
    assert re.findall(words, inspect.getsource(module), re.IGNORECASE) == []


class Observer(Part):
    """Counts tokens, on the device."""

    def add_loss(self, micro: MicroBatch, objective, counted):
        micro.metrics["test/zeros"] = (micro.inputs == 0).float().mean()
        return objective


class HalfBackward(Part):
    """Changes the backward pass: the second half of every sequence gives the blocks no gradient."""

    def after_forward(self, micro: MicroBatch) -> None:
        half = micro.inputs.shape[1] // 2
        micro.hidden.register_hook(lambda grad: torch.cat((grad[:, :half], torch.zeros_like(grad[:, half:])), dim=1))


def test_a_method_that_observes_is_a_class_and_an_entry_in_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "METHODS", {Observer: lambda config: True})
    make(tmp_path, train={"total_steps": 2}).fit()
    lines = [line for line in read_metrics(tmp_path / "tiny") if "loss/main" in line]
    assert len(lines) == 2
    assert all(0 <= line["test/zeros"] < 1 for line in lines)


def test_a_method_that_changes_the_backward_pass_is_a_class_and_an_entry_in_the_list(tmp_path):
    """Against the plain gradient of a loss that has no second half."""
    config = tiny_config(tmp_path, train={"grad_accum": 1})
    inputs, targets = SyntheticData(4, 16).batch(0)
    found = []
    for methods in ({HalfBackward: lambda config: True}, {}):
        torch.manual_seed(0)
        one = build_state(config, torch.device("cpu"), QuietReporter(), methods=methods)
        kept = targets if methods else targets.index_fill(1, torch.arange(8, 16), -100)
        gradient_of(one, inputs, kept)
        found.append(one.model.blocks[0].attention.wq.weight.grad)
    torch.testing.assert_close(2 * found[0], found[1], rtol=1e-4, atol=1e-7)  # means over 16 and over 8 tokens
