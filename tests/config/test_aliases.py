"""Flat spellings of published configs: which keys they set, and what happens to absent features."""

import pytest

from nanochat_cli.config.aliases import ALIASES
from nanochat_cli.config.keys import leaves
from nanochat_cli.config.load import resolve_config
from nanochat_cli.errors import ConfigError

PUBLISHED = """
hidden_dim = 512
num_layers = 6
num_heads = 8
num_kv_heads = 2
ffn_mult = 4.0
max_seq_len = 1024
group_size = 128
total_steps = 500
batch_size = 4
seq_length = 256
learning_rate = 0.01
warmup_steps = 10
weight_decay = 0.1
grad_clip = 0.5
entropy_weight = 0.001
schedule_type = "cosine"
decay_start_frac = 0.5
min_lr_ratio = 0.1
gradient_checkpointing = true
muon_momentum = 0.9
lion_lr_mult = 0.2
lion_weight_decay = 0.01
"""


def test_a_flat_published_config_reaches_its_sections(tmp_path):
    file = tmp_path / "published.toml"
    file.write_text(PUBLISHED)
    config = resolve_config(file=file)
    model, train, optim = config.model, config.train, config.optim
    assert (model.dim, model.n_layers, model.n_heads, model.n_kv_heads) == (512, 6, 8, 2)
    assert (model.ffn_mult, model.max_seq_len, model.quant.scale) == (4.0, 1024, 128)
    assert (train.total_steps, train.batch_size, train.seq_len) == (500, 4, 256)
    assert (train.grad_clip, train.entropy_weight, train.gradient_checkpointing) == (0.5, 0.001, True)
    assert (optim.lr, optim.warmup_steps, optim.weight_decay, optim.schedule) == (0.01, 10, 0.1, "cosine")
    assert (optim.stable_ratio, optim.min_lr_ratio) == (0.5, 0.1)
    assert (optim.muon_momentum, optim.lion_lr_mult, optim.lion_weight_decay) == (0.9, 0.2, 0.01)


def test_every_alias_points_at_a_key_of_the_schema():
    assert set(ALIASES.values()) <= set(leaves())


@pytest.mark.parametrize(
    ("first", "second"), [("hidden_dim", "dim"), ("num_heads", "n_heads"), ("learning_rate", "lr")]
)
def test_two_spellings_set_the_same_key(first, second):
    assert ALIASES[first] == ALIASES[second]


def test_an_alias_counts_inside_a_section_and_on_the_command_line(tmp_path):
    file = tmp_path / "sectioned.toml"
    file.write_text("[model]\nhidden_dim = 512\nnum_heads = 8\n[train]\nlearning_rate = 0.01\n")
    config = resolve_config(file=file, overrides=["num_layers=3"])
    assert (config.model.dim, config.model.n_heads, config.optim.lr, config.model.n_layers) == (512, 8, 0.01, 3)


def test_two_spellings_in_one_file_are_refused(tmp_path):
    file = tmp_path / "twice.toml"
    file.write_text("hidden_dim = 512\n[model]\ndim = 256\n")
    with pytest.raises(ConfigError, match=r"model\.dim and hidden_dim \(.*twice\.toml\): both set model\.dim"):
        resolve_config(file=file)


def test_a_wrong_value_is_reported_under_the_spelling_that_was_written():
    with pytest.raises(ConfigError, match=r'^hidden_dim = "wide" \(--set\): must be an integer'):
        resolve_config(overrides=["hidden_dim=wide"])


def test_flat_spellings_of_the_architectures_reach_their_sections():
    flat = ["use_mtp=true", "mtp_n_tokens=2", "mhc_n_streams=2", "deltanet_ratio=0.25", "use_moe=true", "num_experts=4"]
    config = resolve_config(overrides=[*flat, "n_active_experts=1"])
    assert (config.mtp.enabled, config.mtp.n_tokens, config.model.mhc.streams) == (True, 2, 2)
    assert config.model.deltanet.ratio == 0.25
    assert (config.model.moe.enabled, config.model.moe.experts, config.model.moe.active) == (True, 4, 1)


def test_flat_spellings_of_the_e3_methods_reach_their_sections():
    flat = ["use_collider=true", "collider_threshold=0.3", "collider_sparsity=0.4", "use_async_loader=true"]
    flat += ["num_workers=6", "prefetch_batches=12", "use_8bit_optim=true", "use_galore=true", "galore_rank=64"]
    config = resolve_config(overrides=[*flat, "galore_update_freq=100"])
    assert (config.collider.enabled, config.collider.threshold, config.collider.sparsity) == (True, 0.3, 0.4)
    assert (config.loader.enabled, config.loader.workers, config.loader.prefetch) == (True, 6, 12)
    assert (config.optim.eight_bit, config.optim.galore.enabled) == (True, True)
    assert (config.optim.galore.rank, config.optim.galore.update_freq) == (64, 100)


def test_mhc_with_one_stream_is_the_plain_residual():
    assert resolve_config(["nano-125m"], overrides=["mhc_n_streams=1"]).model.mhc.streams == 1
