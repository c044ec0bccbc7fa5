"""The plan against reality: peak memory of a process, parameters of the built model, size of the file."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_cli.bench.micro.architectures import HONEST_MEMORY
from nanochat_cli.cli.app import main
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.diagnose.plan.memory import training_memory
from nanochat_cli.diagnose.plan.plan import gguf_bytes, make_plan
from nanochat_cli.formats.gguf.write import export_gguf
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.report.reporter import QuietReporter
from nanochat_cli.training.build import build_state
from nanochat_cli.training.next_token import train_step
from tests.architectures import build
from tests.evaluation.saved_runs import save_run

PRESETS = {
    "quickstart": [],
    "quickstart, between float and ternary": ["model.quant.ramp=0.5"],
    "quickstart in int8": ["train.backward=int8", "optim.muon_format=int8"],
    "nano-125m-mhc": ["model.n_layers=2", "train.seq_len=256", "train.batch_size=1"],
    "e3/mtp-only": ["model.n_layers=2", "train.seq_len=128", "train.batch_size=2"],
}
"""Three presets, two of them with so few layers and tokens that a test can train them; one in other forms too."""
FAST = ("quickstart", "quickstart in int8")

SLOW = pytest.mark.slow
CHILD = """
import json, sys
from nanochat_cli.bench.micro.architectures import time_steps
from nanochat_cli.config.load import resolve_config
warm = ["model.vocab_size=320", "model.n_layers=1", "train.batch_size=1", "train.seq_len=32"]
time_steps(resolve_config(["quickstart"], None, warm), compiled=False, steps=1)
print(json.dumps(time_steps(resolve_config([sys.argv[1]], None, sys.argv[2:]), compiled=False, steps=1)))
"""


@pytest.mark.parametrize("preset", [name if name in FAST else pytest.param(name, marks=SLOW) for name in PRESETS])
def test_predicted_memory_is_within_ten_percent_of_the_measured(preset):
    name, overrides = re.split("[, ]", preset)[0], PRESETS[preset]
    command = [sys.executable, "-c", CHILD, name, *overrides]
    environment = {**os.environ, **HONEST_MEMORY, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    measured = json.loads(finished.stdout.splitlines()[-1])["peak_bytes"]
    predicted = training_memory(resolve_config([name], None, overrides)).peak
    assert predicted == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(
    ("device", "forward", "backward", "bytes_per_weight"),
    [
        ("cpu", "int8", "exact", 4.25),
        ("cpu", "int8", "int8", 1),
        ("cuda", "float", "exact", 2),
        ("cuda", "int8", "exact", 1),
        ("cuda", "int8", "int8", 2),
    ],
)
def test_codes_take_the_memory_of_the_copies_that_the_forms_hold(device, forward, backward, bytes_per_weight):
    config = resolve_config(["quickstart"], None, [f"train.forward={forward}", f"train.backward={backward}"])
    with torch.device("meta"):
        layers = [layer for _, layer in Transformer(config.model).linears()]
    weights = sum(layer.weight.numel() for layer in layers)
    scales = 4 * sum(layer.out_features for layer in layers)
    found = training_memory(config, torch.device(device)).quantised
    assert found == bytes_per_weight * weights + scales


def test_a_teacher_and_a_ramp_take_the_memory_of_their_tensors(tmp_path):
    """Weights of the teacher, and one float32 copy of every ternary matrix between the latent and the codes."""
    teacher, _ = save_run(tmp_path / "teacher", quant={"enabled": False})
    plain = training_memory(resolve_config(["quickstart"]))
    taught = training_memory(resolve_config(["quickstart"], None, [f"distill.teacher={tmp_path / 'teacher'}"]))
    assert taught.teacher == sum(4 * p.numel() for p in teacher.parameters())
    assert taught.logits > plain.logits
    ramp = training_memory(resolve_config(["quickstart"], None, ["model.quant.ramp=0.5"]))
    with torch.device("meta"):
        model = Transformer(resolve_config(["quickstart"]).model)
    assert ramp.quantised == plain.quantised + sum(4 * layer.weight.numel() for _, layer in model.linears())
    assert ramp.activations > plain.activations


def training_step(config: Config) -> float:
    torch.manual_seed(0)
    state = build_state(config, torch.device("cpu"), QuietReporter())
    state.progress.step, state.progress.total_steps = 50, 100
    tokens = torch.randint(config.model.vocab_size, (1, 33))
    weight = state.model.blocks[0].ffn_norm.weight  # pyright: ignore
    before = weight.detach().clone()
    loss = train_step(state, tokens[:, :-1], tokens[:, 1:])["loss/main"]
    assert not torch.equal(before, weight)
    return loss


@pytest.mark.parametrize("preset", ["small-560m", "medium-3b"])
def test_the_large_presets_are_built_as_counted(preset):
    config = resolve_config([preset])
    with torch.device("meta"):
        whole = Transformer(config.model)
    assert config.model.count_parameters().total == sum(p.numel() for p in whole.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["small-560m", "medium-3b"])
def test_the_large_presets_take_a_step_at_full_width(preset):
    config = resolve_config([preset])
    # Full width, two layers of each kind's pattern, and the vocabulary cut so that its optimizer state fits a test.
    pattern = {"small-560m": "DA", "medium-3b": "D"}[preset]
    narrow = ["model.vocab_size=2048", f"model.n_layers={len(pattern)}", "model.deltanet.ratio=0.0"]
    reduced = resolve_config([preset], None, [*narrow, f"model.deltanet.pattern={pattern}", "train.batch_size=1"])
    assert reduced.model.dim == config.model.dim
    assert 5 < training_step(reduced) < 15  # ln 2048 is 7.6; a tied start prefers the token it reads


def test_the_file_has_the_predicted_size(tmp_path):
    tokenizer = Tokenizer.train(["def f(x):\n    return x + 1\n"] * 20, 288)
    for combination in ("plain+attention+dense+untied", "mhc-2+hybrid+moe+tied"):
        model = build(combination)
        report = export_gguf(model, tokenizer, tmp_path / "model.gguf", ExportConfig(), {})
        config = Config.model_validate({"model": model.config.model_dump(), "train": {"seq_len": 64}})
        assert gguf_bytes(config, model.config.count_parameters()) == pytest.approx(report.bytes, rel=0.02)


def test_time_follows_from_tokens_and_the_given_utilisation():
    config = resolve_config(["quickstart"])
    plan = make_plan(config, tokens=1000, utilisation=0.25, peak_flops=1e12)
    assert plan.seconds == pytest.approx(1000 * plan.flops_per_token / 0.25e12)
    assert plan.mtp_parameters == 0
    assert make_plan(resolve_config(["test-mtp"]), tokens=1, utilisation=1, peak_flops=1).mtp_parameters == 3 * (
        256**2 + 256
    )


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        (["sparsity=0.4"], 0.6),
        (["sparsity=0.4", "warmup_steps=10"], 0.64),
        (["sparsity=0.4", "threshold=0.3"], 1),
    ],
)
def test_tokens_that_are_filtered_cost_only_the_forward_pass(changes, kept):
    """A third of the work is the forward pass, of every token; how many a threshold filters is known only from data."""
    config = ["train.total_steps=100", *(f"collider.{change}" for change in changes)]
    filtered, plain = (
        make_plan(
            resolve_config(["quickstart"], None, [*config, f"collider.enabled={on}"]),
            tokens=1000,
            utilisation=0.5,
            peak_flops=1e12,
        )
        for on in ("true", "false")
    )
    assert filtered.flops_per_token == pytest.approx(plain.flops_per_token * (1 + 2 * kept) / 3)
    assert filtered.seconds == pytest.approx((plain.seconds or 0) * (1 + 2 * kept) / 3)


def test_a_run_with_a_time_budget_is_planned_to_end_with_it():
    plan = make_plan(resolve_config(["quickstart"]), tokens=None, utilisation=0.5, peak_flops=1e11)
    assert (plan.bound, plan.seconds) == ("train.time_budget", 300)
    assert plan.tokens is not None
    assert 0 <= 300 * 0.5e11 / plan.flops_per_token - plan.tokens < 2048
    assert plan.steps == plan.tokens // 2048


def test_steps_that_end_before_the_time_budget_end_the_run():
    config = resolve_config(["quickstart"], overrides=["train.total_steps=10", "train.time_budget=1e9"])
    plan = make_plan(config, tokens=None, utilisation=0.5, peak_flops=1e11)
    assert (plan.bound, plan.tokens) == ("train.total_steps", 20480)
    assert plan.seconds == pytest.approx(20480 * plan.flops_per_token / 0.5e11)


def planned(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[dict[str, Any], str]:
    """JSON and text of `nanochat plan`."""
    file = tmp_path / "plan.json"
    assert main(["plan", *words, "--json", str(file)]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


def test_plan_takes_a_file_and_names_the_architecture_and_the_basis_of_the_time(capsys, tmp_path):
    flat = tmp_path / "flat.toml"
    flat.write_text("num_layers = 2\ntotal_steps = 100\nmhc_n_streams = 2\n")
    found, text = planned(capsys, tmp_path, "--config", str(flat), "--peak-flops", "1e12")
    assert found["parameters"]["embedding"] == 4096 * 256  # quickstart's
    assert (found["tokens"], found["bound"]) == (100 * 8 * 256, "train.total_steps")
    assert (found["arch"], found["llama_cpp"]) == ("nanochat-ternary", False)
    assert "no: it has 2 residual streams" in text
    assert "50% of 1e+12 FLOP/s (--peak-flops)" in text


def test_an_overlay_alone_plans_quickstart_and_an_absent_device_has_no_speed(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("the device is here")
    found, text = planned(capsys, tmp_path, "--preset", "h200")
    assert found["parameters"]["total"] == 5_507_840
    assert (found["peak_flops"], found["tokens"], found["seconds"]) == (None, None, 300)
    assert "this machine has no train.device = cuda; give its --peak-flops" in text


def test_plan_says_which_processor_and_number_format_it_measured(capsys, tmp_path):
    found, text = planned(capsys, tmp_path, "--set", "train.device=cpu", "--set", "model.n_layers=1")
    assert found["peak_flops"] > 0
    assert "fp32, measured" in text
    assert "5 min" in text
