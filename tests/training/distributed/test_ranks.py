"""What several ranks cannot share is one clear line, before torch is imported."""

import subprocess
import sys

import pytest

from nanochat_cli.cli.app import main
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import ConfigError
from nanochat_cli.training.distributed.ranks import (
    LAUNCHED,
    is_owned,
    rank,
    require_shareable,
    rows_of,
    turns_of,
    world_size,
)

REFUSED = {
    "optim.galore.unbiased": {"optim": {"galore": {"enabled": True, "unbiased": True}}},
    "optim.galore.release_gradients": {"optim": {"galore": {"enabled": True, "release_gradients": True}}},
    "model.quant.start or model.quant.ramp": {"model": {"quant": {"start": 0.2}}},
    "distill.teacher": {"distill": {"teacher": "runs/teacher"}},
    "fire.trigger = dormant": {"fire": {"enabled": True, "trigger": "dormant"}},
}

UNCUT = {
    "model.quant.enabled = false": {"model": {"quant": {"enabled": False}}},
    "fire.enabled = true": {"fire": {"enabled": True, "steps": [2]}},
    "train.compile = on": {"train": {"grad_accum": 4, "compile": "on"}},
    "train.grad_accum = 5": {"train": {"grad_accum": 5}},
    "model.dim = 126": {"model": {"dim": 126, "n_heads": 3, "n_kv_heads": 3, "head_dim": 42}},
    "model.ffn_dim = 254": {"model": {"ffn_dim": 254}},
}


@pytest.fixture
def launched(monkeypatch):
    """As rank 1 of 3."""
    for name, value in zip(LAUNCHED, ("1", "3", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)


def config(sections: dict[str, object], *, grad_accum: int = 4) -> Config:
    return Config.model_validate({"train": {"grad_accum": grad_accum}} | sections)


def test_a_process_that_nobody_launched_is_the_only_rank(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # as some clusters do for every process
    assert (rank(), world_size()) == (0, 1)
    assert not is_owned(config({}))
    assert is_owned(config({"distributed": {"mode": "owned"}}))


def test_a_launched_process_is_owned(launched):
    assert (rank(), world_size()) == (1, 3)
    assert is_owned(config({}))


def test_every_rank_needs_a_micro_batch():
    require_shareable(config({}, grad_accum=3), 3)
    with pytest.raises(ConfigError, match=r"train\.grad_accum = 3: 4 ranks need.*set train\.grad_accum = 4"):
        require_shareable(config({}, grad_accum=3), 4)


@pytest.mark.parametrize("key", REFUSED)
def test_what_ranks_do_not_share_yet_is_refused_in_mode_owned_only(key):
    require_shareable(config(REFUSED[key]), 1)
    with pytest.raises(ConfigError, match=key):
        require_shareable(config(REFUSED[key]), 2)
    with pytest.raises(ConfigError, match=key):  # where any number of ranks is to compute the same
        require_shareable(config(REFUSED[key] | {"distributed": {"mode": "owned"}}), 1)


@pytest.mark.parametrize("key", UNCUT)
def test_what_cannot_be_cut_into_rows_is_refused_by_its_name(key):
    fsdp = UNCUT[key] | {"distributed": {"mode": "fsdp"}}
    with pytest.raises(ConfigError, match=rf"^{key}: not with distributed\.mode = fsdp \("):
        require_shareable(config(fsdp), 4)
    require_shareable(config(UNCUT[key]), 4)


def test_mode_fsdp_takes_a_power_of_two_of_ranks():
    fsdp: dict[str, object] = {"distributed": {"mode": "fsdp"}}
    for ranks in (1, 2, 4, 8):
        require_shareable(config(fsdp, grad_accum=24), ranks)
    with pytest.raises(ConfigError, match=r"^3 ranks: not with distributed"):
        require_shareable(config(fsdp, grad_accum=24), 3)


@pytest.mark.parametrize("mode", ["owned", "fsdp"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_row_of_a_step_is_read_once_and_at_one_time_neighbouring_units_are(mode, ranks):
    train = {"train": {"grad_accum": 8, "batch_size": 3}}
    shared = Config.model_validate(train | {"distributed": {"mode": mode}})
    turns = turns_of(shared, ranks)
    assert turns == (8 // ranks if mode == "fsdp" and ranks > 1 else 1)
    of_turns = [[*(row for one in range(ranks) for row in rows_of(one, ranks, shared.train, turns))]] * turns
    stride = 24 // turns
    assert [row + turn * stride for turn, rows in enumerate(of_turns) for row in rows] == list(range(24))


def test_a_named_gpu_is_not_shared():
    with pytest.raises(ConfigError, match=r"train\.device = cuda:1"):
        require_shareable(Config.model_validate({"train": {"grad_accum": 2, "device": "cuda:1"}}), 2)


def test_the_command_refuses_before_anything_is_started(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--nproc", "4", "--set", "train.grad_accum=2"]) == 2
    assert capsys.readouterr().err == (
        "error: train.grad_accum = 2: 4 ranks need at least one micro-batch each; set train.grad_accum = 4 or more "
        "(and a smaller train.batch_size), or use fewer ranks\n"
    )


def test_torch_is_not_imported_for_it(tmp_path):
    code = "import sys; from nanochat_cli.cli.app import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    line = ["train", "--nproc", "4", "--set", "train.grad_accum=2"]
    subprocess.run([sys.executable, "-c", code, *line], cwd=tmp_path, check=True, capture_output=True)
