"""Changes to the configuration of a resumed run: each takes effect or is refused by key, never silently ignored."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from nanochat_cli.config.keys import leaves
from nanochat_cli.config.schema import Config
from nanochat_cli.errors import NanochatError
from nanochat_cli.formats.run import checkpoints
from nanochat_cli.report.metrics_log import read_metrics
from nanochat_cli.report.reporter import PlainReporter, QuietReporter
from nanochat_cli.training.trainer import Trainer
from tests.training.synthetic import SyntheticData, tiny_config
from tests.training.test_trainer import trainer

STEPS = 3
SMALL = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "ffn_dim": 32}
BASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {"optim": {"galore": {"rank": 8}}},
    "8-bit GaLore with MTP, filtering and FIRE": {
        "optim": {"eight_bit": True, "galore": {"enabled": True, "unbiased": True, "rank": 8, "full_rank_share": 0.3}},
        "mtp": {"enabled": True, "n_tokens": 2},
        "collider": {"enabled": True},
        "fire": {"enabled": True, "steps": [2]},
    },
    "NorMuon with Lion and an extra block": {
        "optim": {"muon_variance_beta": 0.9, "other": "lion", "muon_momentum_start": 0.5, "muon_momentum_warmup": 4},
        "mtp": {"enabled": True, "kind": "nextn"},
    },
}
ELSEWHERE = ("run.dir", "run.name", "data.", "tokenizer.", "grpo.", "export.", "loader.", "bigram_init.")
"""Keys that the trainer does not read when it resumes; a bigram start happens before the first step."""


def base_config(folder: Path, name: str, steps: int = STEPS) -> Config:
    train = {"total_steps": steps, "batch_size": 2, "grad_accum": 1}
    sections = {"model": SMALL, "train": train, "telemetry": {"tensorboard": False}}
    return tiny_config(folder, **(sections | BASES[name]))


def another(key: str, value: Any) -> Any:
    """Another valid value of a key."""
    special: dict[str, Any] = {
        "train.compile": None,  # what it costs to compile
        "train.total_steps": STEPS + 2,
        "train.time_budget": 1000.0,
        "model.deltanet.pattern": "D",
        "model.deltanet.ratio": 1.0,
        "model.dim": 64,
        "model.n_kv_heads": 2,
        "fire.layers": ["*w*"],
        "fire.steps": [1],
        "optim.betas": (0.7, 0.9),
    }
    if key in special:
        return special[key]
    annotation = leaves()[key].annotation
    choices = [c for one in (annotation, *get_args(annotation)) if get_origin(one) is Literal for c in get_args(one)]
    if choices:
        return next((choice for choice in choices if choice not in (value, "auto", "fp8")), None)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.1
    return None


def changed(config: Config, key: str) -> Config | None:
    """`config` with another value of one key, if there is a valid one."""
    values = config.model_dump()
    *path, name = key.split(".")
    section = values
    for part in path:
        section = section[part]
    value = another(key, section[name])
    if value is None or value == section[name]:
        return None
    section[name] = value
    try:
        return Config.model_validate(values)
    except ValueError:
        return None


def trained(folder: Path, base: str) -> Config:
    config = base_config(folder, base)
    run = trainer(config)
    run.fit()
    return base_config(folder, base, STEPS + 1)


@pytest.mark.parametrize("base", BASES)
def test_a_changed_key_works_or_is_named_in_one_line(tmp_path, base):
    config = trained(tmp_path, base)
    run_dir = tmp_path / "tiny"
    parts = set(checkpoints.load(run_dir).tensors)
    tried, refused = 0, {}
    for key in leaves():
        other = None if key.startswith(ELSEWHERE) else changed(config, key)
        if other is None:
            continue
        tried += 1
        try:
            resumed = trainer(other, resume=True)
            resumed._step()
        except NanochatError as error:
            refused[key] = error
            continue
        saved: dict[str, Any] = {}
        resumed.log.sync = lambda: None
        with pytest.MonkeyPatch.context() as patch:
            place = "nanochat_cli.training.trainer.save_together"
            patch.setattr(place, lambda *args, into=saved, **_: into.update(args[3]))
            resumed.save()
        assert parts <= set(saved), f"{key}: what the checkpoint held is lost"
    for key, error in refused.items():
        assert error.exit_code in (2, 3), key
        assert "\n" not in str(error), key
        assert key.removesuffix(".enabled") in str(error), f"{key}: {error}"
    assert tried > 100
    assert {"model.dim", "mtp.enabled", "optim.matrix", "optim.other", "optim.galore.enabled", "run.seed"} <= set(
        refused
    )
    assert not any(
        key.startswith(("train.b", "train.l", "train.s", "train.t", "eval.", "collider.", "fire.", "checkpoint."))
        for key in refused
    ), refused


@pytest.mark.parametrize(
    ("base", "change", "key"),
    [
        ("NorMuon with Lion and an extra block", {"optim": {"muon_variance_beta": 0.0}}, "optim.muon_variance_beta"),
        ("8-bit GaLore with MTP, filtering and FIRE", {"mtp": {"enabled": False}}, "mtp.enabled"),
        ("8-bit GaLore with MTP, filtering and FIRE", {"mtp": {"enabled": True, "n_tokens": 3}}, "mtp.n_tokens"),
        ("8-bit GaLore with MTP, filtering and FIRE", {"mtp": {"enabled": True, "kind": "shared"}}, "mtp.kind"),
        ("plain", {"mtp": {"enabled": True}}, "mtp.enabled"),
    ],
)
def test_a_mismatch_with_the_checkpoint_is_blamed_on_the_changed_key(tmp_path, base, change, key):
    config = trained(tmp_path, base)
    other = Config.model_validate(
        {name: section | change.get(name, {}) for name, section in config.model_dump().items()}
    )
    with pytest.raises(NanochatError, match=rf"was trained with another {key} \(.*--set {key}=") as caught:
        trainer(other, resume=True)
    assert caught.value.exit_code == 3


def test_a_run_whose_checkpoint_holds_no_configuration_is_compared_with_its_config_toml(tmp_path):
    from nanochat_cli.config.load import CONFIG_FILE, config_to_toml
    from nanochat_cli.training.resume import require_resumable

    config = trained(tmp_path, "plain")
    found = checkpoints.load(tmp_path / "tiny")
    del found.state["config"]
    assert require_resumable(found, tmp_path / "tiny", config) == {}
    (tmp_path / "tiny" / CONFIG_FILE).write_text(config_to_toml(config))
    other = config.model_copy(deep=True)
    other.train.batch_size = 1
    assert require_resumable(found, tmp_path / "tiny", other) == {"train.batch_size": 2}
    other.mtp.enabled = True
    with pytest.raises(NanochatError, match=r"another mtp\.enabled"):
        require_resumable(found, tmp_path / "tiny", other)


# -- longer runs -------------------------------------------------------------------------------------------------


def budgeted(folder: Path, **train: object) -> Config:
    sections = {"train": {"total_steps": 20, "time_budget": 1000.0} | train, "eval": {"interval": 1000}}
    return tiny_config(folder, **sections)


def test_more_steps_extend_a_run_with_a_time_budget(tmp_path):
    assert trainer(budgeted(tmp_path)).fit().progress.step == 20
    result = trainer(budgeted(tmp_path, total_steps=40), resume=True).fit()
    assert result.progress.step == 40
    rates = [line["training/lr"] for line in read_metrics(tmp_path / "tiny") if "training/lr" in line]
    assert rates[20] > 0.5 * max(rates), "the decay moved"
    assert rates[-1] < 0.1 * max(rates)


def test_a_time_budget_that_is_used_up_does_not_extend_a_run(tmp_path):
    run = trainer(budgeted(tmp_path))
    with run.log:
        for _ in range(20):
            run._step()
        run.progress.seconds = 1500.0
        run.save()
    with pytest.raises(NanochatError, match=r"^train.time_budget = 1000: the run has used 1500.0 s of it; set more"):
        trainer(budgeted(tmp_path, total_steps=40), resume=True)
    assert trainer(budgeted(tmp_path, total_steps=24, time_budget=None), resume=True).fit().progress.step == 24


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
    trainer(budgeted(tmp_path)).fit()
    with pytest.raises(NanochatError, match=r"^train.total_steps = 10: the run has taken 20 steps") as caught:
        trainer(budgeted(tmp_path, total_steps=10), resume=True)
    assert caught.value.exit_code == 2


def test_a_finished_run_with_a_time_budget_is_finished_when_nothing_was_changed(tmp_path):
    trainer(budgeted(tmp_path)).fit()
    assert trainer(budgeted(tmp_path), resume=True).fit().progress.step == 20


# -- other batches -----------------------------------------------------------------------------------------------


def test_other_batches_continue_at_the_window_where_the_old_ones_ended(tmp_path):
    trainer(base_config(tmp_path, "plain")).fit()  # 3 steps of 2 windows
    config = base_config(tmp_path, "plain", 5)
    config.train.batch_size, config.train.grad_accum = 3, 2
    run = trainer(config, resume=True)
    assert run.data.shifted + 3 * 6 == 3 * 2, "batch 3 of 6 windows begins at window 6"
    assert run.progress.micro_batch == 3
    run.fit()
    config.train.total_steps = 6
    assert trainer(config, resume=True).data.shifted == 6 - 18, "also when it is resumed once more"


def test_another_sequence_length_continues_after_as_many_tokens_and_says_so(tmp_path, capsys):
    trainer(base_config(tmp_path, "plain")).fit()  # 3 × 2 × 16 = 96 tokens
    config = base_config(tmp_path, "plain", 5)
    config.train.seq_len = 8
    run = Trainer(config, SyntheticData(2, 8), tmp_path / "tiny", PlainReporter(), resume=True)
    assert run.data.shifted + 3 * 2 == 96 / 8
    assert "train.seq_len = 8, not 16: the text is cut into other windows" in capsys.readouterr().err


def test_unchanged_batches_are_not_moved(tmp_path):
    trainer(base_config(tmp_path, "plain")).fit()
    run = trainer(base_config(tmp_path, "plain", 5), resume=True)
    assert not hasattr(run.data, "shifted")
    assert isinstance(run.reporter, QuietReporter)
