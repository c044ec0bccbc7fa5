"""Training with activations in NVFP4: refused without the hardware, emulated only when asked, measured exactly."""

import pytest
import torch

from nanochat_cli.config.load import resolve_config
from nanochat_cli.diagnose.plan.memory import training_memory
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.transformer import forms_of
from nanochat_cli.training import devices, number_formats
from nanochat_kernels import nvfp4_ternary
from tests.training.synthetic import tiny_config
from tests.training.test_number_formats import losses, trainer


def configuration(folder, forward, **sections):
    """A few steps, and little beside them."""
    train = {"forward": forward, "total_steps": 3, "grad_accum": 1, **sections.pop("train", {})}
    return tiny_config(folder, train=train, telemetry={"interval": 100, "tensorboard": False}, **sections)


@pytest.fixture
def as_if_blackwell(monkeypatch):
    """The reference computes what a GPU would, on this CPU."""
    monkeypatch.setattr(devices, "has_nvfp4", lambda device: True)


def test_a_machine_without_nvfp4_is_refused_in_one_line_that_says_what_to_use(tmp_path):
    line = (
        r"^train\.forward = nvfp4 needs a GPU of compute capability 10 or 12 \(Blackwell\), and this is cpu: "
        r"use auto, or nvfp4-emulated to study its rounding$"
    )
    with pytest.raises(ConfigError, match=line):
        trainer(configuration(tmp_path, "nvfp4"))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.quant.activations=false", "it needs model.quant.activations"),
        ("model.quant.scale=128", "it needs model.quant.scale = row or tensor, not 128"),
        ("train.backward=int8", "it needs train.backward = exact or bf16"),
    ],
)
@pytest.mark.parametrize("forward", ["nvfp4", "nvfp4-emulated"])
def test_what_contradicts_four_bit_activations_is_refused(forward, override, reason):
    with pytest.raises(ConfigError, match=rf"train\.forward = {forward} .*{reason}"):
        resolve_config(["quickstart"], None, [f"train.forward={forward}", override])


def test_emulated_training_differs_from_the_exact_one_and_stays_near(tmp_path):
    exact, emulated = configuration(tmp_path / "exact", "auto"), configuration(tmp_path / "four", "nvfp4-emulated")
    for config in (exact, emulated):
        trainer(config).fit()
    wanted, found = losses(exact), losses(emulated)
    assert all(a != b for a, b in zip(found[1:], wanted[1:], strict=True))  # the first layers to write begin at 0
    assert all(abs(a - b) < 0.05 * b for a, b in zip(found, wanted, strict=True))


def test_bytes_multiplied_as_on_a_gpu_train_as_the_emulation_does(tmp_path, as_if_blackwell):
    real, emulated = configuration(tmp_path / "real", "nvfp4"), configuration(tmp_path / "four", "nvfp4-emulated")
    for config in (real, emulated):
        trainer(config).fit()
    assert losses(real) == pytest.approx(losses(emulated), rel=1e-4)


def test_weights_in_four_bits_follow_every_step(tmp_path, as_if_blackwell):
    run = trainer(configuration(tmp_path, "nvfp4"))
    layers = run.state.linears.values()
    before = [layer.packed.clone() for layer in layers]
    with run.log:
        run._step()
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.packed, nvfp4_ternary(layer.ternary().codes))
        assert not torch.equal(layer.packed, old)


def test_held_out_text_is_scored_by_the_exact_form_which_is_what_an_export_holds(tmp_path):
    run, tokens = trainer(configuration(tmp_path, "nvfp4-emulated")), torch.arange(16).reshape(1, 16)
    model = run.state.model
    with torch.no_grad():
        trained, scored = model.train()(tokens), model.eval()(tokens)
        model.use_forms("float")
        exact = model(tokens)
    assert torch.equal(scored, exact)
    assert not torch.equal(trained, exact)


def test_a_run_resumes_bit_for_bit_and_may_end_in_the_exact_form(tmp_path):
    configs = [configuration(tmp_path / name, "nvfp4-emulated") for name in ("whole", "part")]
    trainer(configs[0]).fit()
    part = trainer(configs[1])
    with part.log:
        for _ in range(2):
            part._step()
        part.save()
    exact = trainer(configuration(tmp_path / "part", "float"), resume=True)
    assert {layer.form for layer in exact.state.linears.values()} == {"float"}
    again = trainer(configs[1], resume=True)
    again.fit()
    whole, resumed = (checkpoints.load(config.run.dir / "tiny").tensors["model"] for config in configs)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_the_fastest_backward_pass_is_not_sought_in_int8(tmp_path, monkeypatch):
    offered = []
    monkeypatch.setattr(number_formats, "fastest", lambda formats, prepare: (offered.append(formats) or formats[0], ""))
    trainer(configuration(tmp_path, "nvfp4-emulated", train={"backward": "auto"}))
    assert offered == [("exact", "bf16")]


def test_a_layer_without_whole_blocks_of_inputs_is_refused_with_its_width(tmp_path):
    layer = next(iter(trainer(configuration(tmp_path, "auto")).state.linears.values()))
    layer.in_features = 40
    with pytest.raises(ConfigError, match="blocks of 16 inputs, and a layer has 40"):
        forms_of(layer, "nvfp4", "exact", torch.device("cuda"))


def test_the_plan_counts_the_weights_in_four_bits_and_the_bytes_that_are_kept():
    """Of bytes 9 / 16 an input stay for the backward pass, where emulation keeps float32."""
    plans = [
        training_memory(resolve_config(["quickstart"], None, [f"train.forward={form}"]))
        for form in ("float", "nvfp4-emulated", "nvfp4")
    ]
    exact, emulated, real = plans
    assert emulated.quantised == exact.quantised
    assert exact.quantised < real.quantised < 1.13 * exact.quantised
    assert emulated.activations == pytest.approx(exact.activations, rel=0.01)
    assert real.activations < 0.9 * exact.activations
