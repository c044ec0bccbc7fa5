"""A run in other number formats: the same function, a gradient that is off by its rounding, and an exact resume."""

from pathlib import Path

import pytest
import torch

from nanochat_cli.config.sections.model import QuantConfig
from nanochat_cli.config.sections.optim import OptimConfig
from nanochat_cli.errors import ConfigError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.model.bitlinear import BitLinear
from nanochat_cli.optim import galore as galore_module
from nanochat_cli.optim import muon
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training import number_formats
from nanochat_cli.training.devices import require_float8
from nanochat_cli.training.number_formats import fastest
from nanochat_cli.training.trainer import Trainer
from nanochat_kernels import ternarize
from tests.training.synthetic import SyntheticData, tiny_config

FORMATS = [("bf16", "bf16"), ("int8", "fp32"), ("exact", "int8"), ("int8", "int8")]


def configuration(folder, backward, iteration, **sections):
    train = {"backward": backward, **sections.pop("train", {})}
    return tiny_config(folder, train=train, optim={"muon_format": iteration}, **sections)


def trainer(config, *, resume=False, reporter=None):
    data = SyntheticData(config.train.batch_size * config.train.grad_accum, config.train.seq_len)
    run_dir = config.run.dir / "tiny"
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(config, data, run_dir, reporter or QuietReporter(), resume=resume)


def losses(config):
    return [row["loss/main"] for row in read_metrics(config.run.dir / "tiny") if "loss/main" in row]


@pytest.mark.parametrize(("backward", "iteration"), FORMATS)
def test_the_first_loss_is_that_of_the_exact_run_and_later_ones_are_near(tmp_path, backward, iteration):
    exact, other = tiny_config(tmp_path / "exact"), configuration(tmp_path / "other", backward, iteration)
    for config in (exact, other):
        trainer(config).fit()
    wanted, found = losses(exact), losses(other)
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1:] != wanted[1:]
    assert all(abs(a - b) < 0.02 * b for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("backward", "iteration"), FORMATS)
def test_a_resumed_run_equals_the_uninterrupted_one_in_every_format(tmp_path, backward, iteration):
    mtp = {"mtp": {"enabled": True, "n_tokens": 1}}
    configs = [configuration(tmp_path / name, backward, iteration, **mtp) for name in ("whole", "part")]
    trainer(configs[0]).fit()
    part = trainer(configs[1])
    with part.log:
        for _ in range(5):
            part._step()
        part.save()
    again = trainer(configs[1], resume=True)
    assert again.state.score.backward == part.state.score.backward == backward
    again.fit()
    whole, resumed = (checkpoints.load(config.run.dir / "tiny").tensors for config in configs)
    for name in ("model", "mtp"):
        assert all(torch.equal(value, resumed[name][key]) for key, value in whole[name].items())


def test_what_was_measured_is_kept_with_the_run(tmp_path, monkeypatch):
    """Resumed where another format is the faster one, a run stays what it was."""
    said: list[str] = []
    reporter = QuietReporter()
    monkeypatch.setattr(reporter, "info", said.append)
    config = configuration(tmp_path, "auto", "auto")
    monkeypatch.setattr(number_formats, "fastest", lambda formats, prepare: (formats[-1], ", measured"))
    first = trainer(config, reporter=reporter)
    chosen = first.progress.backward, first.progress.iteration
    assert chosen[0] == "int8"
    assert "backward pass: int8, measured" in said
    assert all(layer.backward == "int8" for layer in first.state.linears.values())
    first.save()
    monkeypatch.setattr(number_formats, "fastest", lambda formats, prepare: (formats[0], ""))
    resumed = trainer(config, resume=True)
    assert (resumed.progress.backward, resumed.progress.iteration) == chosen
    assert all(layer.backward == "int8" for layer in resumed.state.linears.values())


def test_another_format_can_be_set_at_resume(tmp_path):
    trainer(configuration(tmp_path, "int8", "int8")).save()
    resumed = trainer(configuration(tmp_path, "exact", "fp32"), resume=True)
    assert (resumed.progress.backward, resumed.progress.iteration) == ("exact", "fp32")
    assert all(layer.operand.dtype == torch.float32 for layer in resumed.state.linears.values())


def test_one_copy_of_the_codes_serves_all_three_products(tmp_path):
    layers = trainer(configuration(tmp_path, "int8", "fp32")).state.linears.values()
    assert all(layer.operand.dtype == torch.int8 for layer in layers)
    assert all(layer.packed is None for layer in layers)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.float32)])
def test_a_gpu_holds_codes_in_the_dtype_that_autocast_multiplies_in(tmp_path, monkeypatch, device, dtype):
    state = trainer(configuration(tmp_path, "exact", "fp32")).state
    state.score.autocast_dtype = torch.bfloat16
    monkeypatch.setattr(type(state.model), "device", torch.device(device))
    number_formats.use_number_formats(state, configuration(tmp_path, "exact", "fp32"))
    assert {layer.operand.dtype for layer in state.linears.values()} == {dtype}


@pytest.mark.parametrize("backward", ["exact", "bf16", "fp8"])
def test_codes_held_in_bfloat16_give_the_same_bits(backward):
    """Under autocast, and without it, where a gradient is multiplied in float32."""
    for autocast in (True, False):
        found = []
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layer, x = BitLinear(128, 64, QuantConfig()), torch.randn(96, 128, requires_grad=True)
            torch.nn.init.normal_(layer.weight)
            layer.use_form("float", backward, dtype)
            layer.requantize()
            assert layer.operand.dtype == dtype
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = layer(x)
            y.backward(torch.randn(96, 64).to(y.dtype))
            found.append((y, x.grad, layer.weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), autocast


def test_every_copy_of_the_codes_follows_the_latent(tmp_path):
    """The transposed one, which only CUDA takes, would else give gradients of weights that were."""
    layer = next(iter(trainer(configuration(tmp_path, "int8", "fp32")).state.linears.values()))
    layer.transposed = torch.zeros(layer.in_features, layer.out_features, dtype=torch.int8)
    with torch.no_grad():
        layer.weight.neg_()
    layer.requantize()
    assert torch.equal(layer.transposed.T, ternarize(layer.weight).codes)
    assert torch.equal(layer.operand, ternarize(layer.weight).codes)


def test_a_float_model_and_grouped_scales_train_as_before(tmp_path):
    for quant in ({"enabled": False}, {"scale": 64}, {"activations": False}):
        model = {"dim": 128, "ffn_dim": 128, "quant": quant}
        exact, other = (
            configuration(tmp_path / f"{len(quant)}{quant}{name}", name, "fp32", model=model)
            for name in ("exact", "int8")
        )
        for config in (exact, other):
            trainer(config).fit()
        assert losses(exact) == losses(other)


def test_the_fastest_format_must_be_clearly_faster():
    def prepare(seconds):
        def work():
            clock.append(seconds)

        return work

    clock: list[float] = []
    times = {"exact": 1.0, "bf16": 0.95, "int8": 0.4}
    now = iter(range(10**6))

    def tick():
        next(now)
        return sum(clock)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(number_formats.time, "perf_counter", tick)
        assert fastest(("exact", "bf16"), lambda name: prepare(times[name])) == ("exact", ", nothing is faster here")
        best, remark = fastest(("exact", "bf16", "int8"), lambda name: prepare(times[name]))
    assert best == "int8"
    assert remark == ", 2.5 × exact here"


def test_auto_measures_on_this_machine(tmp_path):
    progress = trainer(configuration(tmp_path, "auto", "auto")).progress
    assert progress.backward in ("exact", "bf16", "int8")
    assert progress.iteration in ("fp32", "bf16", "int8")


def test_two_formats_of_one_gradient_are_refused():
    config = tiny_config(Path("runs"), train={"backward": "int8", "grad_input": "fp8"})
    with pytest.raises(ConfigError, match=r"train\.grad_input = fp8 and train\.backward = int8"):
        require_float8(config.train, torch.device("cpu"))


def test_attention_by_blocks_trains_alike_and_resumes_exactly(tmp_path):
    """Also with token filtering, whose filtered rows then cost no attention."""
    configs = {}
    for name in ("torch", "blocks", "part"):
        sections = {"mtp": {"enabled": True, "n_tokens": 1}, "collider": {"enabled": True, "warmup_steps": 0}}
        attention = "torch" if name == "torch" else "blocks"
        configs[name] = tiny_config(tmp_path / name, train={"attention": attention}, **sections)
    peer, whole, part = (trainer(config) for config in configs.values())
    peer.fit()
    whole.fit()
    with part.log:
        for _ in range(5):
            part._step()
        part.save()
    trainer(configs["part"], resume=True).fit()
    tensors = {name: checkpoints.load(config.run.dir / "tiny").tensors for name, config in configs.items()}
    for name in ("model", "mtp"):
        assert all(torch.equal(value, tensors["part"][name][key]) for key, value in tensors["blocks"][name].items())
    wanted, found = losses(configs["torch"]), losses(configs["blocks"])
    assert found == pytest.approx(wanted, rel=1e-3)
    assert any(
        not torch.equal(value, tensors["torch"]["model"][key]) for key, value in tensors["blocks"]["model"].items()
    )


def test_the_form_of_attention_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(
        number_formats, "fastest", lambda formats, prepare: (prepare(formats[-1])() and formats[-1], "")
    )
    mtp = {"enabled": True, "n_tokens": 1, "kind": "nextn"}
    config = tiny_config(tmp_path, train={"attention": "auto"}, mtp=mtp)
    first = trainer(config)
    assert {layer.form for layer in number_formats._attentions(first.state)} == {"blocks"}
    assert len(list(number_formats._attentions(first.state))) == config.model.n_layers + 1
    first.save()
    monkeypatch.setattr(number_formats, "fastest", lambda formats, prepare: (formats[0], ""))
    assert trainer(config, resume=True).progress.attention == "blocks"
    changed = tiny_config(tmp_path, train={"attention": "torch"}, mtp=mtp)
    assert trainer(changed, resume=True).progress.attention == "torch"


@pytest.mark.parametrize(
    ("number_format", "galore", "calls"), [("int8", False, 1), ("fp32", False, 0), ("int8", True, 0)]
)
def test_what_is_timed_is_the_step_that_the_run_takes(monkeypatch, number_format, galore, calls):
    """Muon's native call does the momentum and the weights too; GaLore iterates in its subspace alone."""
    native, iterated = [], []
    monkeypatch.setattr(muon, "muon_step_int8", lambda *args, **kwargs: native.append(args) or True)
    monkeypatch.setattr(galore_module, "orthogonalize", lambda m, *args, **kwargs: iterated.append(m.shape) or m)
    optim = OptimConfig.model_validate({"galore": {"enabled": galore, "rank": 8}})
    work = number_formats._matrix_steps(number_format, torch.zeros(64, 32), optim)
    work()
    assert len(native) == calls
    assert iterated == ([torch.Size([2, 8, 64])] if galore else [])
