"""The plan against what really happens: peak memory of a process, parameters of the built model, size of the file."""

import json
import os
import subprocess
import sys

import pytest
import torch

from nanochat_cli.bench.architectures import HONEST_MEMORY
from nanochat_cli.config.load import resolve_config
from nanochat_cli.config.schema import Config, ExportConfig
from nanochat_cli.config.size import count_parameters
from nanochat_cli.data.tokenizer import Tokenizer
from nanochat_cli.export.gguf import export_gguf
from nanochat_cli.model.transformer import Transformer
from nanochat_cli.optim import build_optimizer
from nanochat_cli.planning.memory import training_memory
from nanochat_cli.planning.plan import gguf_bytes, make_plan
from nanochat_cli.training.gradient_step import GradientStep
from tests.architectures import build

PRESETS = {
    "quickstart": [],
    "nano-125m-mhc": ["model.n_layers=2", "train.seq_len=256", "train.batch_size=1"],
    "e3/mtp-only": ["model.n_layers=2", "train.seq_len=128", "train.batch_size=2"],
}
"""Three presets, two of them with fewer layers and tokens: what a test can train."""

SLOW = pytest.mark.slow
CHILD = """
import json, sys
from nanochat_cli.bench.architectures import time_steps
from nanochat_cli.config.load import resolve_config
warm = ["model.vocab_size=320", "model.n_layers=1", "train.batch_size=1", "train.seq_len=32"]
time_steps(resolve_config(["quickstart"], None, warm), compiled=False, steps=1)
print(json.dumps(time_steps(resolve_config([sys.argv[1]], None, sys.argv[2:]), compiled=False, steps=1)))
"""


@pytest.mark.parametrize(
    "preset", [name if name == "quickstart" else pytest.param(name, marks=SLOW) for name in PRESETS]
)
def test_predicted_memory_is_within_ten_percent_of_the_measured(preset):
    command = [sys.executable, "-c", CHILD, preset, *PRESETS[preset]]
    environment = {**os.environ, **HONEST_MEMORY, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    measured = json.loads(finished.stdout.splitlines()[-1])["peak_bytes"]
    predicted = training_memory(resolve_config([preset], None, PRESETS[preset])).peak
    assert predicted == pytest.approx(measured, rel=0.10)


def training_step(config: Config) -> float:
    torch.manual_seed(0)
    model = Transformer(config.model).train()
    model.gradient_checkpointing = config.train.gradient_checkpointing
    optimizers = build_optimizer(model, config.optim)
    tokens = torch.randint(config.model.vocab_size, (1, 33))
    before = model.blocks[0].ffn_norm.weight.detach().clone()  # pyright: ignore
    loss = GradientStep(model, config.train, None, print)(tokens[:, :-1], tokens[:, 1:], optimizers.zero_grad)
    optimizers.step(50, 100)
    model.requantize()
    assert not torch.equal(before, model.blocks[0].ffn_norm.weight)  # pyright: ignore
    return float(loss.cross_entropy)


@pytest.mark.parametrize("preset", ["small-560m", "medium-3b"])
def test_the_large_presets_are_built_as_counted(preset):
    config = resolve_config([preset])
    with torch.device("meta"):
        whole = Transformer(config.model)
    assert count_parameters(config.model).total == sum(p.numel() for p in whole.parameters())


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
        assert gguf_bytes(config, count_parameters(model.config)) == pytest.approx(report.bytes, rel=0.02)


def test_time_follows_from_tokens_and_the_stated_utilisation():
    config = resolve_config(["quickstart"])
    plan = make_plan(config, tokens=1000, utilisation=0.25, peak_flops=1e12)
    assert plan.seconds == pytest.approx(1000 * plan.flops_per_token / 0.25e12)
    assert plan.mtp_parameters == 0
    assert make_plan(resolve_config(["test-mtp"]), tokens=1, utilisation=1, peak_flops=1).mtp_parameters == 3 * (
        256**2 + 256
    )
